"""What every test stands on: one thread, no network, no settings of the developer's shell, no luck."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

# Before transformers or huggingface_hub is imported: they read it at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import torch
from hypothesis import settings

torch.set_num_threads(1)

# Derandomised: a run that fails fails again. No deadline: the machine may be busy.
settings.register_profile("helios", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("helios")


@pytest.fixture(autouse=True)
def _no_helios_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test chooses its backend and fallback itself."""
    for name in [name for name in os.environ if name.startswith("HELIOS_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def make_checkpoint() -> ModuleType:
    """The script ``tools/make_checkpoint.py`` as a module: ``tools`` is no package."""
    path = Path(__file__).parents[1] / "tools" / "make_checkpoint.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
