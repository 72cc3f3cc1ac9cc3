"""Memory, clocks, power and temperature, as far as the machine tells them; nothing here is ever needed."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from helios.backend import Backend

__all__ = ["Sensors", "allocator_peak", "device_bytes", "host_bytes"]

_NVIDIA = {
    "clocks.sm": "clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "power.draw": "power_w",
    "temperature.gpu": "temperature_c",
}


def host_bytes() -> int | None:
    """Resident memory of this process; None where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def device_bytes(backend: Backend) -> int | None:
    """Bytes in use on the device, by anybody; None where the backend does not say."""
    told = backend.memory()
    return None if told is None else told[1] - told[0]


def allocator_peak(backend: Backend) -> int | None:
    """The most bytes that torch's allocator had in use on the device; None where it has no such count."""
    module = getattr(torch, backend.device.type, None)
    count = getattr(module, "max_memory_allocated", None)
    return int(count(backend.device)) if count is not None else None


def _nvidia(device: torch.device) -> dict[str, float]:
    """One query of the driver's own tool, of the device by its identity: numbers may mean other ones to torch."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", "")
    which = f"GPU-{uuid}" if uuid else str(device.index or 0)
    command = ["nvidia-smi", f"--id={which}", f"--query-gpu={','.join(_NVIDIA)}", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    return _numbers(dict(zip(_NVIDIA.values(), told.strip().split(","), strict=True)))


def _numbers(texts: Mapping[str, str]) -> dict[str, float]:
    """Those that are numbers: a card that does not measure something says ``[N/A]``."""
    found: dict[str, float] = {}
    for name, text in texts.items():
        with contextlib.suppress(ValueError):
            found[name] = float(text)
    return found


def _host() -> dict[str, float]:
    """Frequency of the processors and the warmest zone of the host."""
    found: dict[str, float] = {}
    cores = [
        float(line.split(":")[1]) for line in Path("/proc/cpuinfo").read_text().splitlines() if line[:7] == "cpu MHz"
    ]
    if cores:
        found["clock_mhz"] = statistics.mean(cores)
    zones = [int(p.read_text()) / 1000 for p in Path("/sys/class/thermal").glob("thermal_zone*/temp")]
    if zones:
        found["temperature_c"] = max(zones)
    return found


def _reader(backend: Backend) -> tuple[str, Callable[[], dict[str, float]]] | None:
    if backend.device.type == "cuda" and shutil.which("nvidia-smi"):
        return "nvidia-smi", lambda: _nvidia(backend.device)
    if backend.device.type == "cpu" and Path("/proc/cpuinfo").exists():
        return "the host's own counters", _host
    return None


class Sensors:
    """Reads the sensors every few seconds on a thread of its own while a ``with`` block runs.

    Args:
        backend: whose device.
        period: seconds between two readings.
    """

    def __init__(self, backend: Backend, period: float = 2.0) -> None:
        self._reader, self._period = _reader(backend), period
        self._rows: list[dict[str, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Sensors:
        if self._reader is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        assert self._reader is not None
        while True:
            try:
                self._rows.append(self._reader[1]())
            except Exception:  # whatever a driver's tool does: a sensor that cannot be read is no failure of the device
                return
            if self._stop.wait(self._period):
                return

    def told(self) -> Mapping[str, Any] | None:
        """First, last, least, mean and most of each reading; None where nothing can be read."""
        if not self._rows or self._reader is None:
            return None
        rows = {name: [row[name] for row in self._rows if name in row] for name in self._rows[0]}
        spread = {
            name: {
                "first": v[0],
                "last": v[-1],
                "min": min(v),
                "mean": round(statistics.mean(v), 3),
                "max": max(v),
            }
            for name, v in rows.items()
        }
        return {"source": self._reader[0], "readings": len(self._rows), **spread}
