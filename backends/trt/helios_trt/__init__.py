"""The backend for TensorRT: engines built from whole graphs, strongly typed, for TensorRT 10 and 11.

Importing it needs neither TensorRT nor a GPU; ``helios backends`` says what is missing.
"""

from helios_trt.backend import TrtBackend

__all__ = ["TrtBackend"]
