"""The backend for NVIDIA GPUs: Triton kernels, cuBLAS and cuDNN, replayed as CUDA graphs.

Importing it needs neither a GPU nor Triton; ``helios backends`` says what is missing.
"""

from helios_cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
