"""The backend for Ascend NPUs: torch_npu's fused operators, called kernel by kernel or replayed as NPU graphs.

Importing it needs neither an NPU nor CANN nor torch_npu; ``helios backends`` says what is missing.
"""

from helios_ascend.backend import AscendBackend

__all__ = ["AscendBackend"]
