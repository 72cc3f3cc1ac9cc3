"""Helios HAL: run, port and certify the Helios video model on any accelerator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from helios.pipeline import Pipeline, load

__all__ = ["Pipeline", "__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``load`` and ``Pipeline`` on first use, so that ``import helios`` stays light."""
    if name in ("Pipeline", "load"):
        from helios import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'helios' has no attribute {name!r}")
