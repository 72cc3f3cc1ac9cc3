"""What can be chosen of a backend: declared, checked, told, and kept with a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from generate_runs import SIZE, Captured, refused, said

import helios
from helios import backend as backends
from helios.backend import Backend, select
from helios.cli import main
from helios.cli.options import backend_options
from helios.errors import BackendUnavailable, InputError
from helios.pipeline.store import RunFolder
from helios_cpu import CpuBackend


class Tuned(CpuBackend):
    """The CPU with a memory and a mood."""

    name = "tuned"
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"memory": ("full", "low"), "mood": ("calm", "wild", "odd")}

    def __init__(self, provider: str = "", index: int = 0, **options: str) -> None:
        super().__init__(provider, index)
        Backend.__init__(self, provider, index, **options)


class Point:
    value = "test:Tuned"

    @staticmethod
    def load() -> type[Backend]:
        return Tuned


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    own = backends.entry_points()
    monkeypatch.setattr(backends, "entry_points", lambda: {**own, "tuned": [Point]})
    monkeypatch.delenv("HELIOS_BACKEND", raising=False)


def test_defaults_come_first(tuned: None) -> None:
    backend = select("tuned")
    assert backend.chosen == {"memory": "full", "mood": "calm"}
    assert backend.unusual == {}
    other = select("tuned", {"mood": "odd"})
    assert other.chosen == {"memory": "full", "mood": "odd"}
    assert other.unusual == {"mood": "odd"}


def test_auto_is_given_them_too(tuned: None) -> None:
    assert select("auto", {"memory": "low"}).chosen["memory"] == "low"
    assert select("auto", {"memory": "low"}).name == "tuned"  # those of others come before cpu


@pytest.mark.parametrize(
    ("spec", "options", "why"),
    [
        ("tuned", {"speed": "high"}, "no option 'speed'; it has memory=full|low, mood=calm|wild|odd"),
        ("tuned", {"mood": "wils"}, "did you mean 'wild'"),
        ("cpu", {"memory": "low"}, "backend 'cpu' has no option 'memory'; it has none"),
        ("reference", {"memory": "low"}, "backend 'reference' has no option 'memory'"),
    ],
)
def test_others_are_refused(tuned: None, spec: str, options: dict[str, str], why: str) -> None:
    with pytest.raises(InputError) as caught:
        select(spec, options)
    assert why in caught.value.why + caught.value.fix


def test_the_constructor_refuses_them_as_well() -> None:
    with pytest.raises(InputError, match="no option 'speed'"):
        Tuned(speed="high")


def test_an_option_has_values(tuned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tuned, "options", {"mood": ()})
    with pytest.raises(BackendUnavailable, match="option 'mood' without values"):
        select("tuned")


def test_an_instance_takes_none() -> None:
    with pytest.raises(InputError, match="made already"):
        helios.load(size="tiny", backend=Tuned(), backend_options={"mood": "odd"})


def test_texts_of_the_command_line() -> None:
    assert backend_options(None) == {}
    assert backend_options(["a=b", "c = d=e"], "low") == {"a": "b", "c": "d=e", "memory": "low"}
    assert backend_options(["memory=low"], "low") == {"memory": "low"}
    for wrong in ("a", "=b", "a=", ""):
        with pytest.raises(InputError, match="wanted NAME=VALUE"):
            backend_options([wrong])
    with pytest.raises(InputError, match="given as 'full' and as 'low'"):
        backend_options(["memory=full"], "low")


def run(*arguments: Any) -> int:
    return main(["generate", *map(str, arguments)])


def test_a_run_keeps_them(tuned: None, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "boat.mp4"
    asked = ("a boat", *SIZE, "--backend", "tuned", "--precision", "fp32", "--chunks", 1, "--out", out)
    assert run(*asked, "--memory", "low") == 0
    assert "on tuned, memory low in fp32" in said(capsys)
    folder = RunFolder.open(RunFolder.beside(out))
    chosen = {"memory": "low", "mood": "calm"}
    assert folder.about["execution"]["options"] == folder.read(0).state.plan["options"] == chosen
    assert run("--resume", "--chunks", 2, "--out", out) == 0  # as it began
    assert folder.read(1).state.plan["options"] == chosen
    error = refused(capsys, "--resume", "--chunks", 3, "--memory", "full", "--out", out)
    assert "options: {'memory': 'low', 'mood': 'calm'} was saved, {'memory': 'full'" in " ".join(error.split())
    assert folder.finished().count == 2


def test_those_of_another_backend_mean_nothing(tuned: None, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "boat.mp4"
    assert run("a boat", *SIZE, "--backend", "tuned", "--chunks", 1, "--out", out, "--memory", "low") == 0
    branch = ("--from-chunk", 0, "--run", out, "--out", tmp_path / "other.mp4", "--backend", "cpu")
    assert run(*branch) == 0
    assert "memory" not in said(capsys).rpartition("on cpu")[2]
    assert "options" not in RunFolder.open(tmp_path / "other.helios").about["execution"]


def test_mistakes_are_told_in_a_line(tuned: None, tmp_path: Path, capsys: Captured) -> None:
    asked = ("a boat", *SIZE, "--out", tmp_path / "boat.mp4", "--backend")
    assert "backend 'cpu' has no option 'memory'; it has none" in refused(capsys, *asked, "cpu", "--memory", "low")
    assert "did you mean 'low'" in refused(capsys, *asked, "tuned", "--memory", "lo")
    assert "no option 'sped'" in refused(capsys, *asked, "tuned", "--backend-option", "sped=1")
    assert "wanted NAME=VALUE" in refused(capsys, *asked, "tuned", "--backend-option", "sped")


def test_they_are_listed(tuned: None, capsys: Captured) -> None:
    assert main(["backends"]) == 0
    assert "tuned takes --backend-option memory=full|low, --backend-option mood=calm|wild|odd" in said(capsys)
    assert main(["backends", "--json"]) == 0
    told = {one["name"]: one["options"] for one in json.loads(capsys.readouterr().out)["backends"]}
    assert told["tuned"] == {"memory": ["full", "low"], "mood": ["calm", "wild", "odd"]}
    assert told["cpu"] == {}
