"""The bundle as a folder: whole or not there, and of the published form."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from safetensors.torch import load_file

from helios.errors import StorageError
from helios_conformance import bundle, html, manifest, report, verdict
from helios_conformance.run import RunFolder


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_is_in_it(closed: Any, tmp_path: Path) -> None:
    folder = closed.write(tmp_path / "b")
    graphs = {f"graphs/{n}.txt" for n in ("weights", "prompt", "chunk", "stage0", "stage1", "stage2")}
    wanted = graphs | {"report.json", "report.html", "junit.xml", "outputs/ops.safetensors", "MANIFEST.json"}
    assert names(folder) == wanted
    listed = json.loads((folder / "MANIFEST.json").read_text())["files"]
    assert set(listed) == wanted - {"MANIFEST.json"}
    for name, told in listed.items():
        data = (folder / name).read_bytes()
        assert told == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    kept = load_file(folder / "outputs" / "ops.safetensors")
    assert set(kept) == set(closed.tensors)
    told = json.loads((folder / "report.json").read_text())
    assert told["verdict"] == verdict.judge_run(closed.result)


def test_the_schema_is_a_schema_and_takes_every_kind_of_run(closed: Any) -> None:
    schema = report.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    result = closed.result
    jsonschema.validate(closed.report(), schema)
    nothing = type(result)(result.setup, [], {"name": "x"}, result.environment, result.started, result.finished)
    nothing.problem = "its probe raised"
    told = report.assemble(nothing)
    jsonschema.validate(told, schema)
    assert {case["state"] for case in told["cases"]} == {"not_run"}
    assert told["verdict"]["word"] == "not certified"
    assert "its probe raised" in told["verdict"]["sentence"]


def test_cases_that_never_ran_are_entered(closed: Any, tmp_path: Path) -> None:
    folder = closed.write(tmp_path / "b", records=closed.result.records[:-2])
    told = json.loads((folder / "report.json").read_text())
    assert [case["state"] for case in told["cases"]][-2:] == ["not_run", "not_run"]
    outcome = closed.verify(folder)
    assert [str(f) for f in outcome.findings] == []
    assert outcome.report["verdict"]["word"] == "not certified"


def test_infinite_facts_have_a_form(closed: Any) -> None:
    records = [dict(r) for r in closed.result.records]
    records[0] = records[0] | {"facts": {"x": float("inf"), "y": (1, float("nan")), "z": "\ud800"}}
    result = type(closed.result)(**{**vars(closed.result), "records": records})
    told = report.assemble(result)
    assert told["cases"][0]["facts"] == {"x": "inf", "y": [1, "nan"], "z": "?"}
    json.loads(report.dumps(told))


def test_junit_says_what_failed(closed: Any) -> None:
    told = closed.report()
    told["cases"][0].update(state="fail", reason="wrong \x1b[31m & <b>")
    told["cases"][1].update(state="unsupported", reason="no kernel", required=True)
    told["cases"][2].update(state="not_run", reason="no memory", required=False)
    root = ElementTree.fromstring(bundle.junit(told))
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("7", "2", "1")
    first = root.find("testsuite/testcase/failure")
    assert first is not None
    assert first.get("message") == "fail: wrong �[31m & <b>"


def test_junit_skips_what_is_diagnostic_for_an_engine(closed: Any) -> None:
    told = closed.report()
    told["cases"][0].update(state="fail", reason="off")
    told["cases"][1].update(state="unsupported", reason="no kernel", required=True)
    told["cases"][2].update(state="fail", reason="far off", level="blocks")
    told["scope"]["kind"] = "engine"
    root = ElementTree.fromstring(bundle.junit(told))
    assert (root.get("failures"), root.get("skipped")) == ("1", "2")
    (failure,) = root.findall("testsuite/testcase/failure")
    assert failure.get("message") == "fail: far off"
    assert [skipped.get("message") for skipped in root.findall("testsuite/testcase/skipped")] == [
        "diagnostic for engines, not required: fail: off",
        "diagnostic for engines, not required: unsupported: no kernel",
    ]


def test_a_full_disk_leaves_nothing_half_written(closed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(told: Any, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(html, "write", full)
    with pytest.raises(StorageError, match="free some room"):
        closed.write(tmp_path / "b")
    assert names(tmp_path / "b") == set()
    monkeypatch.undo()
    with closed.closed():
        folder = closed.write(tmp_path / "b")
        monkeypatch.setattr(html, "write", full)
        with pytest.raises(StorageError):
            closed.write(folder)
        assert closed.verify(folder).accepted  # the old one stands


def test_too_little_room_is_known_before(closed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageError, match="the bundle needs"):
        closed.write(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_manifest_comes_last_and_an_old_one_goes_first(
    closed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    folder = closed.write(tmp_path / "b")
    (folder / manifest.SIGNATURE).write_text("of the old one")
    moved: list[str] = []
    replace = os.replace

    def watch(source: Any, target: Any) -> None:
        if Path(target).parent == folder:
            moved.append(Path(target).name)
            assert manifest.MANIFEST not in names(folder)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    closed.write(folder)
    assert moved[-1] == manifest.MANIFEST
    assert manifest.SIGNATURE not in names(folder)


def test_a_runs_own_files_go_when_its_bundle_stands(closed: Any, tmp_path: Path) -> None:
    import dataclasses

    setup = dataclasses.replace(closed.result.setup, out=tmp_path / "run")
    folder, _ = RunFolder.create(setup, "hash")
    for told in closed.result.records:
        tensors = {k: v for k, v in closed.tensors.items() if k.startswith(told["id"] + "/")}
        folder.add(told, tensors)
    result = dataclasses.replace(closed.result, setup=setup)
    bundle.write(result, setup.out, texts=closed.texts)
    assert not {n for n in names(setup.out) if n.startswith(("cases", "run"))}
    assert closed.verify(setup.out).accepted


def test_graphs_are_lowered_by_another_process(closed: Any, tmp_path: Path) -> None:
    from helios_conformance import graphs

    assert graphs.of_spec("reference", "bf16", tmp_path / "g") == ""
    assert {f.stem: f.read_text() for f in (tmp_path / "g").iterdir()} == closed.texts
    assert "unknown backend 'nobody'" in graphs.of_spec("nobody", "bf16", tmp_path / "h")


HOG = """
from helios.backend import ReferenceBackend
import torch


class Hog(ReferenceBackend):
    name = label = "hog"

    def synchronize(self):
        if not hasattr(self, "held"):
            self.held = torch.ones(100 << 20)
"""


def test_the_memory_that_a_run_took_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the worker, which has torch and the backend, and in the parent, which judges: to what the system says, and a
    backend that holds 400 MB more is seen to."""
    import os

    from helios.cli import main
    from helios_conformance.workers import peak_rss

    info = tmp_path / "site" / "hog-1.dist-info"
    info.mkdir(parents=True)
    (info.parent / "hog.py").write_text(HOG)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hog\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[helios.backends]\nhog = hog:Hog\n")
    monkeypatch.syspath_prepend(str(info.parent))
    path = os.pathsep.join([str(info.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(bundle.graphs, "of_spec", lambda *given: "left out by a test")
    worker = {}
    for spec in ("reference", "hog"):
        out = tmp_path / spec
        assert main(["certify", "--backend", spec, "--filter", "add[bf16,small]", "--out", str(out)]) == 0
        told = json.loads((out / "report.json").read_text())
        # The kernel counts pages by thread, and adds them up now and then: two readings may differ a little.
        assert 50e6 < told["peak_rss"]["parent"] <= 1.02 * peak_rss()
        assert 50e6 < told["peak_rss"]["worker"] < told["environment"]["memory"]
        worker[spec] = told["peak_rss"]["worker"]
    assert 0.8 < (worker["hog"] - worker["reference"]) / (400 << 20) < 1.5
