"""Engines on disk: what is used, what is built anew and why, what is removed, and what a full disk leaves behind."""

from __future__ import annotations

import errno
import json
import os
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import trt_acts
from trt_product import Weights, builds, only, opened, unit
from trt_rig import HostMachine, recorded
from trt_strict import Strict

from helios.errors import BackendError, HeliosError, InputError, StorageError
from helios_trt import model as models
from helios_trt.build import Settings
from helios_trt.engine import Engine
from helios_trt.engines import Engines
from helios_trt.progress import Line
from helios_trt.store import Store


def eager(engines: Engines) -> Engines:
    return Engines(engines.machine, engines.store, Settings(effort=5), engines.line)


def test_second_start_builds_nothing(make: Any, strict: Strict) -> None:
    for _ in range(2):
        assert isinstance(opened(make(), unit(), Weights(1)), Engine)
    assert builds(strict) == 1


def test_json_beside_says_what_it_is(make: Any, tmp_path: Path) -> None:
    opened(make(), unit(), Weights(1))
    facts = json.loads(only(tmp_path).with_suffix(".json").read_text())
    assert facts["format"] == "helios-trt-1"
    assert facts["graphs"] == {"product": unit().graphs[0].digest}
    assert facts["bytes"] == only(tmp_path).stat().st_size
    assert facts["environment"]["tensorrt"] == "11.4.0.106"
    assert facts["environment"]["device"]["name"] == trt_acts.device()
    assert facts["weights_built_in"] == 64 * 64 * 4


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("sizes", lambda engines: opened(engines, unit(3), Weights(1))),
        ("weights", lambda engines: opened(engines, unit(), Weights(2))),
        ("options", lambda engines: opened(eager(engines), unit(), Weights(1))),
    ],
)
def test_what_an_engine_depends_on(make: Any, strict: Strict, tmp_path: Path, what: str, change: Any) -> None:
    opened(make(), unit(), Weights(1))
    change(make())
    assert builds(strict) == 2
    assert len(list(tmp_path.glob("*.engine"))) == 2


def test_forms_that_change_are_another_engine(make: Any, strict: Strict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graph, written otherwise: a digest of the graph alone would give the old engine."""
    opened(make(), unit(), Weights(1))
    true = models.to_model

    def other(*args: Any, **kwargs: Any) -> Any:
        made = true(*args, **kwargs)
        made.graph.doc_string = "written otherwise"
        return made

    monkeypatch.setattr(models, "to_model", other)
    opened(make(), unit(), Weights(1))
    assert builds(strict) == 2


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (damage, "its bytes are not those that were built"),
        (cut, "its bytes are not those that were built"),
        (Path.unlink, "it is not whole"),
        (lambda path: path.with_suffix(".json").write_text("{"), "it is not whole"),
    ],
)
def test_damaged_entry_is_built_anew(
    make: Any, strict: Strict, tmp_path: Path, told: StringIO, harm: Any, reason: str
) -> None:
    opened(make(), unit(), Weights(1))
    before = only(tmp_path).read_bytes()
    harm(only(tmp_path))
    opened(make(), unit(), Weights(1))
    assert builds(strict) == 2
    (line,) = [line for line in told.getvalue().splitlines() if "anew" in line]
    assert reason in line
    assert only(tmp_path).read_bytes() == before


def test_foreign_entry_under_this_name_is_built_anew(make: Any, strict: Strict, tmp_path: Path, told: StringIO) -> None:
    """Somebody copied an engine of another GPU over ours, with its JSON."""
    opened(make(), unit(), Weights(1))
    beside = only(tmp_path).with_suffix(".json")
    facts = json.loads(beside.read_text())
    facts["environment"]["device"]["name"] = "another GPU"
    beside.write_text(json.dumps(facts))
    opened(make(), unit(), Weights(1))
    assert builds(strict) == 2
    assert f"device name is another GPU, here {trt_acts.device()}" in told.getvalue()


def test_other_gpu_builds_its_own_and_says_so(
    make: Any, strict: Strict, told: StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(make(), unit(), Weights(1))
    monkeypatch.setenv(trt_acts.DEVICE, "device 1")
    opened(make(), unit(), Weights(1))
    assert builds(strict) == 2
    assert "device name is device 0, here device 1" in told.getvalue()


def test_other_version_builds_its_own_and_says_so(make: Any, told: StringIO, tmp_path: Path) -> None:
    opened(make(), unit(), Weights(1))
    with recorded(10) as ten:
        opened(make(), unit(), Weights(1))
        assert builds(ten) == 1
    assert "tensorrt is 11.4.0.106, here 10.16.1.11" in told.getvalue()
    assert len(list(tmp_path.glob("*.engine"))) == 2


def test_engine_that_tensorrt_refuses_is_built_anew(
    make: Any, strict: Strict, told: StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is as it was built, and the machine says it is the same; TensorRT knows better."""
    opened(make(), unit(), Weights(1))
    monkeypatch.setattr(
        HostMachine, "identity", lambda self: {"name": "device 0", "capability": "0.0", "driver": "0.0"}
    )
    monkeypatch.setenv(trt_acts.DEVICE, "device 1")
    opened(make(), unit(), Weights(1))
    assert builds(strict) == 2
    assert "the engine is for device device 0, this is device 1" in told.getvalue()


def test_run_that_goes_on_with_another_engine_is_refused(make: Any, strict: Strict) -> None:
    engines = make()
    opened(engines, unit(), Weights(1))
    again = make()
    again.used.update(dict.fromkeys(engines.used, "0" * 64))
    with pytest.raises(InputError, match="another engine of product"):
        opened(again, unit(), Weights(1))


@pytest.mark.parametrize("file", ["weights.bin", "model.onnx", "engine", "facts.json"])
def test_full_disk_leaves_nothing_behind(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    true = Path.open

    def full(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return true(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        opened(make(), unit(), Weights(1))
    assert "XDG_CACHE_HOME" in caught.value.fix
    assert not list(tmp_path.glob("*.engine"))
    assert not list(tmp_path.glob("*.json"))
    assert not list((tmp_path / "building").iterdir())
    monkeypatch.undo()
    with recorded(11):
        opened(make(), unit(), Weights(1))


def test_too_little_room_is_told_before_anything_is_written(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("helios_trt.room.shutil.disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"needs 0\.00 GB"):
        opened(make(), unit(), Weights(1))
    assert not list((tmp_path / "building").iterdir())


def sized(make: Any, folder: Path) -> int:
    opened(make(), unit(), Weights(1))
    return only(folder).stat().st_size


def test_budget_removes_the_longest_unused_first(make: Any, tmp_path: Path) -> None:
    size = sized(make, tmp_path)
    first = only(tmp_path)
    opened(make(), unit(), Weights(2))
    (second,) = set(tmp_path.glob("*.engine")) - {first}
    for at, path in enumerate((second, first)):  # the first was used again after the second
        os.utime(path.with_suffix(".json"), (at + 1, at + 1))
    opened(make(budget=int(2.5 * size)), unit(), Weights(3))
    assert first.exists()
    assert not second.exists()
    assert not second.with_suffix(".json").exists()
    assert len(list(tmp_path.glob("*.engine"))) == 2


def test_budget_keeps_what_is_in_use_and_says_so(make: Any, tmp_path: Path, told: StringIO) -> None:
    size = sized(make, tmp_path)
    first = only(tmp_path)
    using = make()
    opened(using, unit(), Weights(1))
    assert "HELIOS_TRT_BUDGET" not in told.getvalue()
    opened(make(budget=int(1.5 * size)), unit(), Weights(2))
    assert first.exists()
    (line,) = [line for line in told.getvalue().splitlines() if "HELIOS_TRT_BUDGET" in line]
    assert "those in use are not removed" in line
    del using
    opened(make(budget=int(1.5 * size)), unit(), Weights(3))
    assert not first.exists()
    assert told.getvalue().count("HELIOS_TRT_BUDGET") == 1


def test_engine_larger_than_the_budget_is_refused(make: Any, tmp_path: Path) -> None:
    size = sized(make, tmp_path)
    with pytest.raises(StorageError, match="more than all engines may take") as caught:
        opened(make(budget=size - 1), unit(), Weights(2))
    assert caught.value.fix.startswith("HELIOS_TRT_BUDGET=")
    assert len(list(tmp_path.glob("*.engine"))) == 1


@pytest.mark.parametrize("text", ["much", "-1", "0", "nan"])
def test_budget_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    monkeypatch.setenv("HELIOS_TRT_BUDGET", text)
    with pytest.raises(InputError, match="wanted gigabytes"):
        Store(tmp_path)


def test_budget_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HELIOS_TRT_BUDGET", "1.5")
    assert Store(tmp_path).budget == 1_500_000_000


def test_entries_by_the_beginning_of_their_name(make: Any, tmp_path: Path) -> None:
    engines = make()
    opened(engines, unit(), Weights(1))
    opened(engines, unit(), Weights(2))
    first, second = (entry.name for entry in engines.store.entries())
    assert engines.store.named(first[:-2]).name == first
    assert engines.store.named(str(tmp_path / f"{second}.engine")).name == second
    with pytest.raises(InputError, match="more than one"):
        engines.store.named("product")
    with pytest.raises(InputError, match="no engine is called 'nothing'"):
        engines.store.named("nothing")


def test_timings_of_earlier_builds_are_given_to_later_ones(make: Any, strict: Strict, tmp_path: Path) -> None:
    opened(make(), unit(), Weights(1))
    (cache,) = tmp_path.glob("timing-*.cache")
    first = cache.read_bytes()
    opened(make(), unit(), Weights(2))
    given = [g["serialized_timing_cache"] for c, g in strict.calls if c == "IBuilderConfig.create_timing_cache"]
    assert first in given
    assert len(cache.read_bytes()) > len(first)


def test_timings_that_are_damaged_cost_time_alone(make: Any, strict: Strict, tmp_path: Path) -> None:
    opened(make(), unit(), Weights(1))
    (cache,) = tmp_path.glob("timing-*.cache")
    cache.write_bytes(b"what is this")
    opened(make(), unit(), Weights(2))
    assert builds(strict) == 2
    assert cache.read_bytes().startswith(trt_acts.MAGIC)


def test_full_device_is_told_and_nothing_is_built_anew(
    make: Any, strict: Strict, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(make(), unit(), Weights(1))

    def full(self: Any, serialized_engine: Any) -> None:
        self._logger.log(strict.module.ILogger.Severity.ERROR, "Cuda Runtime (out of memory)")

    monkeypatch.setattr(trt_acts.Runtime, "_do_deserialize_cuda_engine", full)
    with pytest.raises(BackendError, match="out of memory") as caught:
        opened(make(), unit(), Weights(1))
    assert "rm " not in caught.value.fix
    assert builds(strict) == 1


def test_folder_called_memory_is_no_reason(
    strict: Strict, tmp_path: Path, told: StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "memory"
    opened(Engines(HostMachine(), Store(folder), Settings(), Line(told)), unit(), Weights(1))
    monkeypatch.setattr(trt_acts.Runtime, "_do_deserialize_cuda_engine", lambda self, serialized_engine: None)
    with pytest.raises(BackendError, match="does not take") as caught:
        opened(Engines(HostMachine(), Store(folder), Settings(), Line(told)), unit(), Weights(1))
    assert caught.value.fix.startswith("remove it: rm ")
    assert builds(strict) == 2


@pytest.mark.parametrize(
    ("kind", "what", "fails"),
    [
        (trt_acts.OnnxParser, "_do_parse_from_file", lambda self, model: False),
        (trt_acts.Builder, "_do_build_serialized_network", lambda self, network, config: None),
        (trt_acts.Runtime, "_do_deserialize_cuda_engine", lambda self, serialized_engine: None),
    ],
)
def test_what_went_wrong_before_is_no_reason(
    make: Any, strict: Strict, monkeypatch: pytest.MonkeyPatch, kind: type, what: str, fails: Any
) -> None:
    engines = make()
    engines.wanted(unit(), Weights(1))  # the parser was asked what it takes
    engines.log.log(strict.module.ILogger.Severity.ERROR, "an older error")
    monkeypatch.setattr(kind, what, fails)
    with pytest.raises(HeliosError, match="it says not why"):
        opened(engines, unit(), Weights(1))


def test_engine_that_stays_refused_is_told(make: Any, strict: Strict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_acts.Runtime, "_do_deserialize_cuda_engine", lambda self, serialized_engine: None)
    with pytest.raises(BackendError, match="does not take"):
        opened(make(), unit(), Weights(1))
    assert builds(strict) == 2
