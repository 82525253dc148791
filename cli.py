"""Run the command line from a checkout: `python cli.py scan ...`. Never packaged."""

from mambacupy_command import main

main()
