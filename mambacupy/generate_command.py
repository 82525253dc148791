"""One run of `mambacupy generate`: from a folder and a prompt to text on the terminal, a file of tokens, and a summary."""

import contextlib
import json
import os
import re
import time
from pathlib import Path

import click
import numpy as np

from mambacupy import generate_files, streams
from mambacupy.npy_files import FileError, Outputs, refuse_overwriting

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


class Job:
    """What was asked for, read and checked; then run, and told about.

    Parameters
    ----------
    given : dict
        The command's arguments by name.
    device : callable
        From the name of a device to its number, None for the CPU.

    Raises
    ------
    FileError
        Something cannot be used; one line.
    """

    def __init__(self, given, device):
        self.given = given
        if (given["prompt"] is None) == (given["tokens"] is None):
            raise FileError("wanted --prompt TEXT or --tokens FILE, one of them")
        if given["stop"] and given["no_stop"]:
            raise FileError("--stop and --no-stop exclude each other")
        if given["pad"] is not None and given["tokens"] is None:
            raise FileError("--pad is for --tokens FILE")
        model, self.output = Path(given["model"]), given["output"]
        if not os.path.isdir(model):
            raise FileError(f"{model}: no such folder, wanted one with config.json and weights")
        if self.output is not None:
            read = [given[name] for name in ("tokens", "tokenizer") if given[name] is not None]
            with _errors():
                read += [path for path in model.iterdir() if path.suffix != ".npy"]
            refuse_overwriting([self.output], read, "run")
            Outputs(given["force"]).rehearse(self.output)
        self._read_prompt()
        self.stop = generate_files.stop_tokens(given["stop"], self.tokenizer)
        if len(self.prompt) > 1 and self.output is None and not given["as_json"]:
            raise FileError(f"{given['tokens']}: has {len(self.prompt)} rows, whose tokens need -o FILE or --json")
        self.gpu = device(given["device"])
        self._load()

    def _read_prompt(self):
        given, self.tokenizer = self.given, None
        named = given["tokenizer"] or Path(given["model"], "tokenizer.json")
        if given["prompt"] is not None or given["tokenizer"]:
            self.tokenizer = generate_files.read_tokenizer(named)
        if given["tokens"] is not None:
            self.prompt, self.mask = generate_files.read_tokens(given["tokens"], given["pad"])
            return
        try:
            given["prompt"].encode()
        except UnicodeEncodeError:  # bytes that this terminal's encoding has not
            raise FileError("--prompt: is no text, but other bytes; wanted some text to go on from") from None
        self.prompt = np.array([self.tokenizer.encode(given["prompt"]).ids], np.int64)
        self.mask = np.ones(self.prompt.shape, bool)
        if not self.prompt.size:
            raise FileError("--prompt: has no token, wanted some text to go on from")

    def _load(self):
        from mambacupy.models import MambaLM

        with _errors():
            options = {"dtype": self.given["dtype"], "device": self.gpu}
            self.model, self.params = MambaLM.from_pretrained(self.given["model"], **options)
            ends = generate_files.end_tokens(self.given["model"])
        if not self.stop and not self.given["no_stop"]:
            self.stop = [token for token in ends if token < self.model.config.vocab_size]

    # ------------------------------------------------------------------------------------------------ the run
    def run(self):
        """Generate, and write the output file. Returns the exit code: 0, or 130 after Ctrl-C."""
        from mambacupy.generation import generate

        self.steps, self.texts, self.unheard = [], [], None
        self.streams = [generate_files.TextStream(self.tokenizer) for _ in self.prompt] if self.tokenizer else []
        self.interrupted, self.begin, self.first = False, time.perf_counter(), None
        options = {name: self.given[name] for name in SAMPLING}
        tokens, mask = self._on_device(self.prompt), None if self.mask.all() else self._on_device(self.mask)
        try:
            with _errors(self.given["tokens"]):
                generate(
                    self.model, self.params, tokens, self.given["max_new_tokens"], mask=mask, on_step=self._show,
                    stop=self.stop, pad=self.given["pad"], **options,
                )  # fmt: skip
        except KeyboardInterrupt:
            self.interrupted = True
        self.end = time.perf_counter()
        self._tell("".join(stream.end() for stream in self.streams[:1]) + "\n" * bool(self.steps))
        self.made = np.stack(self.steps, axis=1) if self.steps else np.empty((len(self.prompt), 0), np.int64)
        if self.output is not None:
            with Outputs(self.given["force"]) as outputs:
                outputs.create(self.output, self.made.shape, np.int64)[...] = self.made
        return 130 if self.interrupted else 0

    def _on_device(self, x):
        if self.gpu is None:
            return x
        import cupy

        with cupy.cuda.Device(self.gpu):
            return cupy.asarray(x)

    def _show(self, tokens):
        """One step's tokens: kept, and a single row's shown."""
        self.first = self.first or time.perf_counter()
        self.steps.append(tokens)
        if len(tokens) == 1:
            self._tell(self.streams[0].add(tokens[0]) if self.streams else f"{' ' if self.steps[1:] else ''}{tokens[0]}")

    def _tell(self, text):
        if self.given["as_json"]:
            self.texts.append(text)
        elif len(self.prompt) == 1 and text and not self.unheard:
            try:
                click.echo(text, nl=False)
            except OSError as error:  # of standard output: go on for the file's sake alone
                self.unheard = error
                if self.output is None:
                    raise

    # ------------------------------------------------------------------------------------------------ the summary
    def report(self, place):
        """Print the summary: JSON on stdout, or a line on stderr."""
        steps, given = self.made.shape[1], self.given
        prompt_seconds = (self.first or self.end) - self.begin
        seconds = self.end - self.begin - prompt_seconds
        per_second = (steps - 1) * len(self.prompt) / seconds if steps > 1 and seconds > 0 else None
        if given["as_json"]:
            facts = {
                "text": "".join(self.texts).removesuffix("\n") if self.tokenizer and len(self.prompt) == 1 else None,
                "tokens": self.made.tolist(),
                "prompt_tokens": self.mask.sum(axis=1).tolist(),
                "interrupted": self.interrupted,
                "device": place,
                "prompt_seconds": round(prompt_seconds, 6),
                "seconds": round(seconds, 6),
                "tokens_per_second": per_second and round(per_second, 3),
                "outputs": [] if self.output is None else [str(Path(self.output))],
            }
            click.echo(json.dumps(facts))
        elif not given["quiet"]:
            rows = f" in each of {len(self.prompt)} rows" if len(self.prompt) != 1 else ""
            rate = f", {per_second:.4g} tokens/s" if per_second else ""
            ended = "interrupted: " if self.interrupted else ""
            streams.tell(f"{ended}{steps} tokens{rows} after {self.mask.sum()} of prompt, on {place}{rate}")
            if self.output is not None:
                streams.tell(f"wrote {click.format_filename(Path(self.output))}")
        if self.unheard:
            raise self.unheard


@contextlib.contextmanager
def _errors(tokens=None):
    """The library's errors about what was given, as one line each; `tokens` is the file of the argument of that name."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:  # the GPU's own
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        elif isinstance(error, OSError) and not isinstance(error, FileNotFoundError):  # standard output's
            raise
        for operation in ("generate: ", "Sampling: ", "load: "):
            text = text.removeprefix(operation)
        about_tokens = tokens is not None and re.match(r"(row \d+ of )?(tokens|mask)\b", text)
        raise FileError(f"{tokens}: {text}" if about_tokens else text) from None
