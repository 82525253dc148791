"""What the tests of the command line share: running it in this process or in one of its own, and the files it is given.

`run` is a fixture: a module that wants it says `run = command.run`.
"""

import os
import pty
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from mambacupy import cli

ROOT = Path(__file__).parent.parent
OPTIONS = ("--softplus",)
"""The base case's options, as the command line spells them."""


# ---------------------------------------------------------------------------------------------------- running
@pytest.fixture
def run(capsys):
    """Function that runs `mambacupy` in this process. An exception that the command line lets through fails the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        return types.SimpleNamespace(code=stop.value.code, **capsys.readouterr()._asdict())

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


def start(*arguments, ignored=(), **options):
    """`mambacupy` in a process of its own, whose signals are not those that a shell may have turned off."""

    def turn_on():
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": turn_on} | options
    return subprocess.Popen([sys.executable, ROOT / "cli.py", *map(str, arguments)], cwd=ROOT, **options)


def shell(line, redirection, **options):
    """Exit code and standard error of `mambacupy` in a shell."""
    line = f"{shlex.quote(sys.executable)} cli.py {line} {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60, **options)
    return done.returncode, done.stderr


BAD_STREAMS = {  # what a shell does to standard output, and the line on standard error
    "full": (">/dev/full", "mambacupy: standard output: No space left on device\n"),
    "closed": (">&-", "mambacupy: standard output: Bad file descriptor\n"),
    "unread": ("| head -0", ""),
}


def shown_on_terminal(*arguments):
    """What `mambacupy` writes to a terminal that is its standard error."""
    ours, theirs = pty.openpty()
    process = start(*arguments, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 4096):
            seen += part
    except OSError:  # how Linux says that the other end is closed
        pass
    finally:
        os.close(ours)
    process.communicate(timeout=30)
    assert process.returncode == 0
    return seen


SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


def check_interruption(process, folder, temporary, name):
    """Send the signal `name` when a file like `temporary` is there: the process ends quietly, with the signal's code."""
    wait_for(lambda: list(folder.glob(temporary)) or process.poll() is not None)
    time.sleep(0.1)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (SIGNALS[name], b"")
    assert b"Traceback" not in err and len(err.splitlines()) <= 1


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def refused(done, words):
    """Whether a run ended with exit code 2 and one line on stderr that has all the words."""
    assert done.code == 2
    assert done.out == ""
    assert len(done.err.splitlines()) == 1 and done.err.endswith("\n"), done.err
    assert done.err.startswith("mambacupy: ") and all(word in done.err for word in words), done.err
    return True


FAILURES = {  # what is raised in the middle of a run, its exit code, and words of the one line
    "memory": (MemoryError(), 2, "out of memory"),
    "interrupt": (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
    "gpu": (type("OutOfMemoryError", (Exception,), {})("Out of memory\nallocating"), 2, "--device cpu may help"),
}


# ---------------------------------------------------------------------------------------------------- files
def save(folder, arguments, how=None):
    """Write arguments as a folder of files, or with numpy.savez or numpy.savez_compressed as one file."""
    arguments = {name: x for name, x in arguments.items() if x is not None}
    folder.mkdir()
    if how is not None:
        how(folder / "inputs.npz", **arguments)
        return folder / "inputs.npz"
    for name, x in arguments.items():
        np.save(folder / f"{name}.npy", x)
    return folder


def command_options(options):
    found = ["--discretization", options["discretization"]]
    return found + ["--softplus"] * options["delta_softplus"] + ["--reverse"] * options["reverse"]


def same(got, wanted):
    return (got.shape, got.dtype, got.tobytes()) == (wanted.shape, wanted.dtype, wanted.tobytes())


def files_in(folder):
    """Every file below a folder with its content: what a run that failed must leave as it was."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


# ---------------------------------------------------------------------------------------------------- damage to a folder
def change(name, how):
    """Put how(array) in a file's place."""
    return lambda folder: np.save(folder / f"{name}.npy", how(np.load(folder / f"{name}.npy")))


def write(name, content):
    """Replace the file `name` by bytes, or by some of its own."""

    def damage(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else (folder / name).read_bytes()[content])

    return damage


def forbid(path, mode=0):
    path.chmod(mode)
    if os.access(path, os.W_OK):
        pytest.skip("nothing is forbidden to this user")
