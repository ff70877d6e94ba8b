"""The command line: argument parsing and printing only; the work is done in the layers below."""

from sparsekit.cli.main import main

__all__ = ["main"]
