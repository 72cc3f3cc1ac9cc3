"""Helios HAL: run, port and certify the Helios video model on any accelerator."""

__version__ = "0.1.0"
