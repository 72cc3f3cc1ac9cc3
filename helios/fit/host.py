"""This machine as a process sees it: cores and memory under its cgroup, disk. Standard library alone."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from pathlib import Path

__all__ = ["Host", "Limits", "cgroup_limits", "hub_cache", "read_host"]

_NO_LIMIT = 1 << 60
"""Version 1 writes a page-rounded 2⁶³ where there is no limit."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a control group allows: bytes and cores; ``None`` where it sets no limit."""

    memory: int | None = None
    used: int | None = None
    cores: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """One machine, as far as this process may use it.

    Attributes:
        system: kernel and architecture.
        cpu: name of the processor.
        cores: that the machine has.
        usable_cores: after affinity and cgroup; a fraction is a share of one core.
        memory: bytes that the machine has.
        memory_limit: bytes that the cgroup allows, or ``None``.
        available: bytes that can be taken now, under both.
        cache: folder in which hub downloads land.
        disk_free: bytes free there.
    """

    system: str
    cpu: str
    cores: int
    usable_cores: float
    memory: int
    memory_limit: int | None
    available: int
    cache: str
    disk_free: int

    @property
    def usable_memory(self) -> int:
        """Bytes that this process could ever have."""
        return min(self.memory, self.memory_limit or self.memory)


def read_host() -> Host:
    """This machine, now."""
    limits = cgroup_limits()
    total, free = _meminfo()
    available = free
    if limits.memory is not None:
        available = min(free, limits.memory - (limits.used or 0))
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cache = hub_cache()
    return Host(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_name(),
        cores=os.cpu_count() or 1,
        usable_cores=min(affinity, limits.cores or affinity),
        memory=total,
        memory_limit=limits.memory,
        available=max(0, available),
        cache=str(cache),
        disk_free=shutil.disk_usage(_existing(cache)).free,
    )


def hub_cache() -> Path:
    """Where downloads of the hub land, by the variables that the hub itself reads."""
    if place := os.environ.get("HF_HUB_CACHE"):
        return Path(place).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def cgroup_limits(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Limits:
    """The tightest limits on the way from this process's control groups to the root, of versions 1 and 2.

    Args:
        root: where the hierarchies are mounted.
        membership: the file that says which groups this process is in.
    """
    memory: list[tuple[int, int | None]] = []
    cores: list[float] = []
    for line in _text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for group in _upwards(root, path) if (root / "cgroup.controllers").exists() else ():
                _note_memory(memory, group, "memory.max", "memory.current")
                _note_quota(cores, *(_text(group / "cpu.max").split() or ["max", "0"])[:2])
        if "memory" in controllers.split(","):
            for group in _upwards(root / "memory", path):
                _note_memory(memory, group, "memory.limit_in_bytes", "memory.usage_in_bytes")
        if "cpu" in controllers.split(","):
            for group in _upwards(root / "cpu", path):
                _note_quota(cores, _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us"))
    quota = min(cores, default=None)
    if not memory:
        return Limits(cores=quota)
    limit, used = min(memory, key=lambda pair: pair[0] - (pair[1] or 0))
    return Limits(limit, used, quota)


def _upwards(base: Path, path: str) -> list[Path]:
    """The group's folder and all above it, up to and with the mount. In a container the mount is the group itself."""
    parts = [part for part in path.strip("/").split("/") if part and part != ".."]
    folders = [base.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]
    return [folder for folder in folders if folder.is_dir()]


def _note_memory(found: list[tuple[int, int | None]], group: Path, limit: str, used: str) -> None:
    text, usage = _text(group / limit), _text(group / used)
    if text.isdigit() and int(text) < _NO_LIMIT:
        found.append((int(text), int(usage) - _reclaimable(group) if usage.isdigit() else None))


def _reclaimable(group: Path) -> int:
    """Bytes of cached files, which the kernel charges to the group and gives back under pressure."""
    stat = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines() if " " in line)
    value = stat.get("total_inactive_file", stat.get("inactive_file", "0"))
    return int(value) if value.isdigit() else 0


def _note_quota(found: list[float], quota: str, period: str) -> None:
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        found.append(int(quota) / int(period))


def _text(path: Path) -> str:
    """Content of a small file, stripped; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _meminfo() -> tuple[int, int]:
    """Total and available bytes."""
    fields = dict(line.split(":", 1) for line in _text(Path("/proc/meminfo")).splitlines() if ":" in line)
    if "MemTotal" in fields:
        total, available = (int(fields.get(key, "0").split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
        return total, available
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return pages * size, pages * size


def _cpu_name() -> str:
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
