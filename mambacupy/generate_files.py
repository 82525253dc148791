"""What `mambacupy generate` reads beside the weights: tokenizer, prompt, stop tokens; and text out of tokens as they come."""

from pathlib import Path

import numpy as np

from mambacupy.npy_files import FileError, open_array, refuse_no_file
from mambacupy.stored_tensors import read_json

MOST_HELD = 8
"""Tokens that are held back at most: a character has four bytes."""

MISSING = 'the package tokenizers is not installed: pip install "mambacupy[models]"'


# ---------------------------------------------------------------------------------------------------- what goes in
def read_tokenizer(path):
    """The tokenizer of a `tokenizer.json`.

    Raises
    ------
    FileError
        There is no such file, it is none, or the package `tokenizers` is not installed.
    """
    path = Path(path)
    try:
        refuse_no_file(path, "a tokenizer.json")
        content = path.read_bytes()
    except FileNotFoundError:
        hint = "--tokenizer FILE names one, --tokens FILE takes numbers instead of text"
        raise FileError(f"{path}: no such file; {hint}") from None
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise FileError(f"{path}: {MISSING}") from None
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises nothing narrower
        raise FileError(f"{path}: not a tokenizer.json ({error})") from None


def read_tokens(path, pad=None):
    """Prompts of a `.npy` file.

    Parameters
    ----------
    path : path
        An array (length,) or (batch, length) of integers.
    pad : int, optional
        The number that is no token but padding.

    Returns
    -------
    (array (batch, length) of int64, array (batch, length) of bool)
        The tokens, and where there are any.

    Raises
    ------
    FileError
    """
    tokens = open_array(path)
    if tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2):
        raise FileError(f"{path}: {tokens.dtype} {tokens.shape}, wanted integers (length,) or (batch, length)")
    if tokens.dtype == np.uint64 and tokens.size and tokens.max() >= 2**63:
        raise FileError(f"{path}: holds {tokens.max()}, more than any token")
    tokens = np.array(np.atleast_2d(tokens), np.int64)
    return tokens, np.ones(tokens.shape, bool) if pad is None else tokens != pad


def end_tokens(folder):
    """The end-of-text tokens that a checkpoint's `generation_config.json` or `config.json` names: a list, empty if none.

    Raises
    ------
    ValueError, OSError
        As `mambacupy.stored_tensors.read_json` raises them.
    """
    for path in (Path(folder, "generation_config.json"), Path(folder, "config.json")):
        found = read_json(path).get("eos_token_id") if path.exists() else None
        tokens = found if isinstance(found, list) else [found]
        if tokens and all(type(token) is int and token >= 0 for token in tokens):
            return tokens
    return []


def stop_tokens(words, tokenizer):
    """Numbers of tokens that are given as numbers, or as the tokenizer spells them.

    Raises
    ------
    FileError
        A word is neither.
    """
    found = []
    for word in words:
        token = int(word) if word.isascii() and word.isdecimal() else tokenizer and tokenizer.token_to_id(word)
        if token is None:
            raise FileError(f"--stop {word}: wanted the number of a token, or one as the tokenizer spells it")
        found.append(token)
    return found


# ---------------------------------------------------------------------------------------------------- what comes out
class TextStream:
    """The text of tokens that come one by one.

    A character may be several tokens, and how a token reads may depend on the one before. So the last few are decoded together,
    and text is held back while it ends inside a character.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.tokens = tokenizer, []
        self.start = self.told = 0  # tokens[start:told] are decoded again, and have been told

    def add(self, token):
        """The text that is complete with this token; "" while there is none."""
        self.tokens.append(int(token))
        nonsense = len(self.tokens) - self.told > MOST_HELD
        return self._tell(lambda text: nonsense or not text.endswith("\N{REPLACEMENT CHARACTER}"))

    def end(self):
        """What was held back."""
        return self._tell(lambda text: True)

    def _tell(self, is_complete):
        before = self._decode(self.tokens[self.start : self.told])
        text = self._decode(self.tokens[self.start :])
        if len(text) <= len(before) or not is_complete(text):
            return ""
        self.start, self.told = self.told, len(self.tokens)
        return text[len(before) :]

    def _decode(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
