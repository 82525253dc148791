"""What the checkpoint formats share: files mapped instead of read, tensors that stay there until asked for, JSON."""

import collections
import json
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAX_TEXT_BYTES = 100_000_000
"""The most that a header, an index or a pickle may take: those of real checkpoints take a few MB."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a mapped file. Nothing of it is read before `array`.

    Attributes
    ----------
    buffer : mmap.mmap
        The file.
    offset : int
        Byte of the file at which the first element lies.
    dtype : numpy.dtype
    shape : tuple of int
    strides : tuple of int, optional
        In bytes, none negative; None for a C-contiguous tensor.
    """

    buffer: mmap.mmap
    offset: int
    dtype: np.dtype
    shape: tuple
    strides: tuple | None = None

    def array(self):
        """The tensor as a C-contiguous array: a read-only view of the file, or a copy where it is stored in another order or
        at an address that its dtype cannot have."""
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, self.dtype)
        return np.require(
            np.ndarray(self.shape, self.dtype, self.buffer, self.offset, self.strides), requirements=["C", "ALIGNED"]
        )


def map_file(path):
    """A file's bytes, read from the disk where they are touched.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'is no regular file' if path.exists() else 'no such file'}")
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError(f"{path}: is empty")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_json(path):
    """The JSON object in a file, as a dict.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It holds something else.
    """
    content = map_file(path)
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"{path}: has {len(content)} bytes, more than the {MAX_TEXT_BYTES} that JSON is read from")
    return parse_json(path, content[:])


def parse_json(label, text):
    """The JSON object that bytes spell, as a dict; `label` names them in errors.

    Raises
    ------
    ValueError
        They are no JSON object in UTF-8, or one that names a key twice, where readers would disagree on which counts.
    """
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError(f"{label}: not a JSON object (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{label}: not a JSON object ({one_line(error)})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{label}: not a JSON object (a JSON {type(found).__name__})")
    return found


def _without_duplicates(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        name, count = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it has {count} of {shown(name)}")
    return found


def is_size(x):
    """Whether x is an integer from 0 to 2^63 - 1; JSON's true and false are none."""
    return type(x) is int and 0 <= x < 1 << 63


def is_shape(x):
    """Whether x is a list or tuple of sizes, no more of them than any weight has."""
    return isinstance(x, (list, tuple)) and len(x) <= 8 and all(map(is_size, x))


def shown(x, limit=80):
    """Something from a file as an error may print it: on one line, and not endless."""
    try:
        text = repr(x)
    except RecursionError:
        text = f"a {type(x).__name__}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(key):
    """A tensor's name as an error may print it."""
    return key if key.isprintable() and len(key) <= 80 else shown(key)


def listed(items, limit=8):
    """The first of some texts, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return f"{', '.join(items[:limit])}{more}"


def one_line(error):
    """An exception's message on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
