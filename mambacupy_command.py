"""The command `mambacupy`. It lies beside the package, whose import takes long enough for Ctrl-C to come in between."""

import os
import signal


def main():
    """Import the command line, and run it."""
    handler = signal.getsignal(signal.SIGINT)
    before_and_after = _end if handler is signal.default_int_handler else handler  # background jobs of scripts ignore it
    signal.signal(signal.SIGINT, before_and_after)
    from mambacupy import cli

    try:
        signal.signal(signal.SIGINT, handler)
        cli.main()
    finally:
        signal.signal(signal.SIGINT, before_and_after)


def _end(*_):
    """While Python imports, or ends, an exception would be caught or told about by others. There is nothing to clean up."""
    os._exit(130)
