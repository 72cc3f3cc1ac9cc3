"""Helios by ONNX Runtime: whole graphs on any of its execution providers. Importing this needs no ONNX Runtime."""

from __future__ import annotations

from helios_ort.backend import OrtBackend

__all__ = ["OrtBackend"]
