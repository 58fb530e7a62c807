"""The command ``exactprune``: options in, tables and run folders out. See docs/cli.md."""

from exactprune.cli.app import main

__all__ = ["main"]
