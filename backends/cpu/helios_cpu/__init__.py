"""The CPU backend: torch's own kernels, oneDNN with weights packed at load, and passes over memory made few.

Every op has a kernel: the op's body where torch already does it in one pass, a tuned one where not. What was tuned, and
what it gave, stands in docs/performance.md.
"""

from helios_cpu.backend import CpuBackend

__all__ = ["CpuBackend"]
