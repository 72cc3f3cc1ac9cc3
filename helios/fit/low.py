"""``memory=low`` of backends that offer it: weights that have no room stay on the host and cross the bus each forward.

Everything here is computed and predicted; nothing is measured.
"""

from __future__ import annotations

import dataclasses

from helios import backend as backends
from helios.errors import BackendError
from helios.fit.costs import LATENT_FRAMES
from helios.fit.estimate import Fit, Work, fit_memory
from helios.model.room import RESERVE
from helios.model.vae import frames_of

__all__ = ["LEFT_FREE", "RATES", "Low", "fit_low", "offers_low"]

LEFT_FREE = 8 << 30
"""Bytes of the device that resident weights leave to everything else."""
SLOTS = 1_300_000_000
"""Bytes of them for weights on their way: eight of the largest, at the published size."""
RATES = {3: 12e9, 4: 25e9, 5: 55e9}
"""Bytes a second out of pinned memory, over 16 lanes of a bus by its PCIe generation: an assumption."""


@dataclasses.dataclass(frozen=True, slots=True)
class Low:
    """A setting with little memory.

    Attributes:
        fit: in memory, with ``resident`` bytes of the weights on the device.
        resident: bytes of weights that stay there.
        fetched: bytes that cross the bus in each forward.
        seconds: that this takes in each forward; 0 where the bus is not known.
        fps: what frames a second cannot exceed by the bus alone; 0 where it is not known, or nothing is fetched.
    """

    fit: Fit
    resident: int
    fetched: int
    seconds: float
    fps: float


def offers_low(spec: str) -> bool:
    """Whether the backend of that name is installed and has ``memory=low``; its device need not be here."""
    try:
        cls = backends.load(backends.parse_spec(spec)[0])
    except BackendError:
        return False
    return "low" in cls.options.get("memory", ())


def fit_low(work: Work, memory: int, forwards: int, pcie: int = 0) -> Low:
    """Lay a setting out with as many weights on the device as leave ``LEFT_FREE``. What only prompts read goes first.

    Args:
        work: counted.
        memory: bytes of the device.
        forwards: of the transformer in a chunk.
        pcie: generation of the bus; 0 where unknown.
    """
    room = max(0, int(memory * (1 - RESERVE)) - LEFT_FREE)
    resident = work.weights if room >= work.weights else min(room, work.step_weights)
    fetched = max(0, work.step_weights - resident)
    found = fit_memory(work, memory, resident=resident, slots=SLOTS if fetched else 0)
    seconds = fetched / RATES[pcie] if pcie in RATES else 0.0
    frames = work.setting.batch * frames_of(work.setting.size.vae, LATENT_FRAMES)
    return Low(found, resident, fetched, seconds, frames / (forwards * seconds) if seconds else 0.0)
