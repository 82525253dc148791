"""Run the command line from a checkout: `python cli.py scan ...`. Never packaged."""

from mambacupy.cli import main

main()
