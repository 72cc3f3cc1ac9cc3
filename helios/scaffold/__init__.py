"""A new backend's package, written from templates: what ``helios new-backend`` does."""

from helios.scaffold.package import KINDS, Package, write

__all__ = ["KINDS", "Package", "write"]
