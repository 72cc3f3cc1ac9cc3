"""The command line: ``helios = "helios.cli:main"``."""

from helios.cli.app import app, main

__all__ = ["app", "main"]
