"""What several files of tests start from."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest
from generate_runs import SIZE, generate

from helios.pipeline.store import RunFolder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three chunks. Not to be changed: ``copied`` gives one that may be."""
    out = tmp_path_factory.mktemp("finished") / "boat.mp4"
    assert generate("a red boat", *SIZE, "--frames", 99, "--seed", 4, "--out", out) == 0
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(RunFolder.beside(finished), tmp_path / "boat.helios")
    return Path(shutil.copyfile(finished, tmp_path / "boat.mp4"))


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good folder of tiny random weights. Not to be changed either."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_checkpoint.write_checkpoint(path, size_name="tiny", variant_name="distilled")
    return path
