"""The command line: one file a command."""

from cmr_fast.cli.main import main

__all__ = ["main"]
