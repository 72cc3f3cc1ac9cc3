"""The command line; the installed command ``helios`` gets here through ``helios_hal``."""

from helios.cli.app import app, main

__all__ = ["app", "main"]
