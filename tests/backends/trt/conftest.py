"""Engines of the recorder: emulated, not run on a device; each test module has a cache folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
from trt_rig import HostMachine, recorded
from trt_strict import Strict

from helios_trt.build import Settings
from helios_trt.engines import Engines
from helios_trt.progress import Line
from helios_trt.store import Store


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where engines are kept; never the user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home / "helios" / "trt"


@pytest.fixture
def strict() -> Iterator[Strict]:
    with recorded(11) as found:
        yield found


@pytest.fixture
def told() -> StringIO:
    return StringIO()


@pytest.fixture
def make(strict: Strict, tmp_path: Path, told: StringIO) -> Callable[..., Engines]:
    """Engines as a new process would begin with them."""

    def made(budget: int = 10**9, **settings: int) -> Engines:
        return Engines(HostMachine(), Store(tmp_path, budget), Settings(**settings), Line(told))

    return made
