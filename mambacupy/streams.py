"""Standard output and standard error, which may be full, closed, or pipes that nobody reads."""

import os
import sys

import click


def mend():
    """Let every text be written, to streams that were closed before we started too.

    To write to such a standard output is an error; what is written to such a standard error is lost. And no file of ours gets
    the number of a stream, to which others may write.
    """
    if sys.stdout is None:
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def tell(line):
    """Write a line to standard error, if that takes it."""
    try:
        click.echo(line, err=True)
    except OSError:
        give_up(sys.stderr)


def give_up(stream):
    """Let what a stream could not take be lost, or Python would try again at its end, and say so."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
