"""Helios graphs as ONNX models: what a device that takes graphs, and not kernels, can run.

Needs ``onnx`` and ``onnx_ir`` (``pip install helios-hal[onnx]``); the rest of Helios does not, so nothing is
imported here.
"""
