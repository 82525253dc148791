"""The command `mambacupy`. It lies beside the package, whose import takes long enough for Ctrl-C to come in between."""

import os
import signal


def main():
    """Import the command line, and run it."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # it is ignored, and stays so, in the background of a shell script
        signal.signal(signal.SIGINT, _end)
    from mambacupy import cli

    signal.signal(signal.SIGINT, handler)
    cli.main()


def _end(*_):
    """An exception could be caught, or told about, by what is just imported. There is nothing to clean up yet."""
    os._exit(130)
