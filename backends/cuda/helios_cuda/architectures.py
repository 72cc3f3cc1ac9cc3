"""What the supported architectures have to give: shared memory, registers, room for warps.

Source: NVIDIA's CUDA Programming Guide, appendix "Compute Capabilities", its tables by compute capability. Each block
takes 1 KiB of shared memory more than it asks for; registers are given to a warp in units of 256.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

__all__ = ["ARCHITECTURES", "LEAST_SHARED", "Architecture", "block_shared"]

REGISTERS = 64 << 10
REGISTER_UNIT = 256
WARP = 32
RESERVED = 1 << 10


@dataclasses.dataclass(frozen=True, slots=True)
class Architecture:
    """Limits of one compute capability.

    Args:
        capability: such as 90 for 9.0.
        block_shared: bytes of shared memory that one block may have.
        shared: bytes of shared memory of a multiprocessor.
        warps, blocks: that a multiprocessor holds at once.
    """

    capability: int
    block_shared: int
    shared: int
    warps: int
    blocks: int

    @property
    def name(self) -> str:
        """As the tables of tiles call it."""
        return f"sm_{self.capability}"

    def occupancy(self, warps: int, registers: int, shared: int) -> float:
        """Part of the multiprocessor's room for warps that blocks fill; 0 where not even one fits.

        Args:
            warps: of a block.
            registers: of a thread.
            shared: bytes of a block.

        >>> ARCHITECTURES["sm_90"].occupancy(warps=8, registers=128, shared=100 << 10)
        0.25
        """
        if shared > self.block_shared:
            return 0.0
        taken = math.ceil(max(registers, 1) * WARP / REGISTER_UNIT) * REGISTER_UNIT * warps
        blocks = min(self.warps // warps, REGISTERS // taken, self.shared // (shared + RESERVED), self.blocks)
        return blocks * warps / self.warps


_TABLE = (
    Architecture(80, 163 << 10, 164 << 10, warps=64, blocks=32),
    Architecture(86, 99 << 10, 100 << 10, warps=48, blocks=16),
    Architecture(89, 99 << 10, 100 << 10, warps=48, blocks=24),
    Architecture(90, 227 << 10, 228 << 10, warps=64, blocks=32),
    Architecture(100, 227 << 10, 228 << 10, warps=64, blocks=32),
    Architecture(120, 99 << 10, 100 << 10, warps=48, blocks=24),
)
ARCHITECTURES: Mapping[str, Architecture] = {row.name: row for row in _TABLE}
"""By name, those that kernels are compiled for without a device."""
LEAST_SHARED = min(row.block_shared for row in _TABLE)
"""Bytes that a block has on all of them."""


def block_shared(name: str) -> int:
    """Bytes of shared memory that a block may have; of an architecture that is not listed, what it has at least.

    >>> block_shared("sm_103") == ARCHITECTURES["sm_100"].block_shared, block_shared("") == LEAST_SHARED
    (True, True)
    """
    capability = int(name.removeprefix("sm_") or 0)
    older = [row for row in _TABLE if row.capability // 10 == capability // 10 and row.capability <= capability]
    return older[-1].block_shared if older else LEAST_SHARED
