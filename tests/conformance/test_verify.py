"""What the verifier accepts, and each thing that it must refuse, by name."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helios.cli import main
from helios.errors import InputError
from helios_conformance import manifest, recheck, references, suite, verify
from helios_conformance.contradictions import contradictions


def test_a_bundle_of_a_right_backend_is_certified_and_accepted(closed: Any, tmp_path: Path) -> None:
    outcome = closed.verify(closed.write(tmp_path / "b"))
    assert [str(f) for f in outcome.findings] == []
    assert outcome.report["verdict"]["word"] == "certified"
    assert outcome.recomputed == len(closed.cases)
    assert outcome.tier == "self-tested"


Edit = Callable[[dict[str, Any]], Any]


def case(told: dict[str, Any], name: str = "linear[bf16,small]") -> dict[str, Any]:
    return next(c for c in told["cases"] if c["id"] == name)


def widen(told: dict[str, Any]) -> None:
    for value in case(told)["outputs"].values():
        value["bounds"] = {k: v * 2 if k != "count" else v for k, v in value["bounds"].items()}


def fall_back(told: dict[str, Any]) -> None:
    case(told)["coverage"] = [["linear", 0, 0, 2, "no kernel"]]
    told["verdict"]["word"] = "certified"


EDITS: dict[str, tuple[Edit, bool, str]] = {
    "an edited figure": (
        lambda r: case(r)["outputs"]["o0"]["errors"].update(norm=1e-9),
        True,
        r"linear\[bf16,small\]\.outputs\.o0\.errors\.norm: it says 1e-09, recomputed",
    ),
    "a widened budget": (widen, True, r"outputs\.o0\.bounds\.norm: it says"),
    "another reference error": (
        lambda r: case(r)["outputs"]["o0"]["reference"].update(norm=0.5),
        True,
        r"outputs\.o0\.reference\.norm",
    ),
    "a state turned red": (lambda r: case(r).update(state="fail"), True, r"it says fail, recomputed pass"),
    "a missing case": (lambda r: r["cases"].pop(2), True, r"a case that such a run takes is missing"),
    "a case twice": (lambda r: r["cases"].append(r["cases"][0]), True, r"it is there 2 times"),
    "another order": (lambda r: r["cases"].reverse(), True, r"not in the suite's order"),
    "a case of no suite": (lambda r: r["cases"][0].update(id="add[bf16,easy]"), True, r"does not take this case"),
    "a case not required": (lambda r: case(r).update(required=False), True, r"required: it says false"),
    "another check": (lambda r: case(r).update(check="op_refuses"), True, r"check: it says"),
    "another suite's hash": (lambda r: r["suite"].update(hash="0" * 64), False, r"another suite made it: 0{64}"),
    "another opset": (lambda r: r["suite"].update(opset_hash="0" * 64), True, r"suite\.opset_hash"),
    "another seed": (
        lambda r: (r["suite"].update(seed=8), r["weights"].update(seed=8)),
        True,
        r"cases\.add\[bf16,small\]",
    ),
    "a seed that the weights do not have": (lambda r: r["weights"].update(seed=8), False, r"weights\.seed"),
    "a checkpoint that nothing read": (
        lambda r: r.update(
            weights={"origin": "checkpoint", "sha256": "0" * 64, "name": "x", "seed": 7, "levels": {}}
            | {"scale": r["weights"]["scale"]}
        ),
        False,
        r"weights\.origin",
    ),
    "another nonce": (lambda r: r["suite"].update(nonce="aa"), True, r"cases\.rms_norm"),
    "a fallback in a certified run": (fall_back, False, r"nodes ran by the reference in a certified run"),
    "an emulated device": (
        lambda r: r["backend"].update(emulated="torch on a CPU"),
        True,
        r"nothing emulated is evidence: torch on a CPU",
    ),
    "a verdict of its own": (lambda r: r["verdict"].update(sentence="All is well."), False, r"verdict\.sentence"),
    "a level turned green": (
        lambda r: r["verdict"]["levels"]["blocks"].update(state="pass"),
        False,
        r"verdict\.levels\.blocks\.state",
    ),
    "a caveat left out": (lambda r: r["not_proved"].pop(), False, r"not_proved"),
    "coverage that the cases do not have": (
        lambda r: r["coverage"][0].__setitem__(1, 99),
        False,
        r"coverage\[0\]\[1\]",
    ),
    "an engine's leniency": (
        lambda r: case(r, "add[bf16,small,nan]")["facts"].update(engine=True),
        True,
        r"scope\.kind: it says kernels, elsewhere the report says engine",
    ),
    "another class by the same name": (
        lambda r: r["backend"].update({"class": "helios_cuda:CudaBackend"}),
        True,
        r"backend\.class: helios_cuda:CudaBackend is not the backend that is called 'reference'",
    ),
    "a version that is not installed": (
        lambda r: r["backend"].update(version="9.9"),
        True,
        r"backend\.version: helios-hal is 9\.9 here",
    ),
    "torch of no version": (lambda r: r["environment"]["packages"].update(torch=None), True, r"packages\.torch"),
    "an end before the beginning": (
        lambda r: r.update(finished="2020-01-01T00:00:00+00:00"),
        True,
        r"the run ended before it began",
    ),
    "more time in cases than in the run": (
        lambda r: case(r).update(seconds=9e5),
        True,
        r"finished: cases took 9000\d\d",
    ),
    "no time at all": (lambda r: case(r).update(seconds=0.0), True, r"cannot even be hashed in 0\.0 s"),
    "a device smaller than its output": (
        lambda r: r["backend"]["device"].update(memory=3),
        True,
        r"on a device of 3",
    ),
    "memory beyond the machine": (
        lambda r: r["peak_rss"].update(worker=2**50),
        True,
        r"peak_rss\.worker: 1,125,899,906,842,624 bytes on a machine of",
    ),
    "a precision that it does not offer": (
        lambda r: r["backend"].update(precisions=["fp32"]),
        True,
        r"bf16 ran, which the backend does not offer",
    ),
    "a speed that nothing measured": (
        lambda r: r.update(realtime={"fps": {"steady": 99.0}}),
        False,
        r"realtime: a speed without the level realtime",
    ),
    "a better tier": (lambda r: r.update(tier="witnessed"), False, r"not as the schema says"),
    "a key too many": (lambda r: r.update(award="gold"), False, r"award"),
}


@pytest.mark.parametrize("name", EDITS)
def test_refuses(name: str, closed: Any, tmp_path: Path) -> None:
    edit, derive, pattern = EDITS[name]
    told = closed.report()
    edit(told)
    found = closed.refusals(closed.forge(told, tmp_path / "b", derive=derive))
    assert re.search(pattern, found), found


def test_the_forger_of_these_tests_makes_acceptable_bundles(closed: Any, tmp_path: Path) -> None:
    """Otherwise the refusals above would show nothing."""
    assert closed.verify(closed.forge(closed.report(), tmp_path / "b")).accepted


@pytest.mark.parametrize("name", ["linear[bf16,small]/o0", "rms_norm[bf16,outliers]/o0", "concat[bf16,one]/o0"])
def test_refuses_an_edited_output(name: str, closed: Any, tmp_path: Path) -> None:
    tensors = {k: v.clone() for k, v in closed.tensors.items()}
    tensors[name][3] += 1
    found = closed.refusals(closed.forge(closed.report(), tmp_path / "b", tensors=tensors))
    assert name.replace("/", ".outputs.") in found


def test_refuses_outputs_that_are_not_there_or_nobody_named(closed: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = closed.write(tmp_path / "b")
    file = folder / "outputs" / "ops.safetensors"
    tensors = load_file(file)
    moved = {("x" if name == "linear[bf16,small]/o0" else name): t for name, t in tensors.items()}
    save_file(moved, file)
    closed.seal(folder)
    found = closed.refusals(folder)
    assert "it lacks linear[bf16,small]/o0" in found
    assert "no case has the output x" in found


def test_refuses_what_hides_in_the_tensors_file(closed: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = closed.write(tmp_path / "b")
    save_file(closed.tensors, folder / "outputs" / "ops.safetensors", metadata={"note": "hidden"})
    closed.seal(folder)
    assert "not written as the suite writes tensors" in closed.refusals(folder)


@pytest.mark.parametrize("name", ["report.html", "junit.xml", "graphs/stage2.txt", "outputs/ops.safetensors"])
def test_refuses_a_changed_file(name: str, closed: Any, tmp_path: Path) -> None:
    folder = closed.write(tmp_path / "b")
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(bytes(data))
    assert f"{name}: its SHA-256 is not that of the manifest" in closed.refusals(folder)
    closed.seal(folder)
    closed.refusals(folder)


def test_refuses_graphs_of_another_plan(closed: Any, tmp_path: Path) -> None:
    folder = closed.write(tmp_path / "b")
    (folder / "graphs" / "stage1.txt").write_text(closed.texts["stage1"].replace("gelu", "silu", 1))
    closed.seal(folder)
    assert "not the plan of the published size" in closed.refusals(folder)
    for file in (folder / "graphs").iterdir():
        file.unlink()
    (folder / "graphs" / "none.txt").write_text("no room\n")
    closed.seal(folder)
    assert "graphs: the plan of the published size is missing" in closed.refusals(folder)


def test_refuses_links_and_strange_files(closed: Any, tmp_path: Path) -> None:
    folder = closed.write(tmp_path / "b")
    (folder / "outputs" / "extra.bin").write_bytes(b"x")
    assert "outputs/extra.bin: the manifest does not name it" in closed.refusals(folder)
    closed.seal(folder)
    assert "a bundle has no such file" in closed.refusals(folder)
    (folder / "outputs" / "extra.bin").unlink()
    (folder / "junit.xml").unlink()
    (folder / "junit.xml").symlink_to("/etc/hostname")
    assert "junit.xml: neither a plain file nor a folder" in closed.refusals(folder)
    (folder / "junit.xml").unlink()
    os.mkfifo(folder / "junit.xml")
    assert "junit.xml: neither a plain file nor a folder" in closed.refusals(folder)


def test_names_in_a_manifest_never_leave_the_folder(closed: Any, tmp_path: Path) -> None:
    folder = closed.write(tmp_path / "b")
    told = json.loads((folder / manifest.MANIFEST).read_text())
    told["files"]["../../../etc/passwd"] = {"bytes": 1, "sha256": "0" * 64}
    (folder / manifest.MANIFEST).write_text(json.dumps(told))
    assert "etc/passwd: the manifest names it, but it is missing" in closed.refusals(folder)


def quickly(bundles: Any, folder: Path, pattern: str) -> None:
    started = time.process_time()
    assert pattern in bundles.refusals(folder)
    assert time.process_time() - started < 5.0


def test_refuses_a_huge_report_without_reading_it(closed: Any, tmp_path: Path) -> None:
    folder = closed.write(tmp_path / "b")
    os.truncate(folder / "report.json", 1 << 30)  # sparse
    (folder / manifest.MANIFEST).write_text('{"format": 1, "files": {}}')
    quickly(closed, folder, "report.json: 1,073,741,824 bytes; at most 33,554,432 are read")
    os.truncate(folder / "report.json", (1 << 30) + 1)
    quickly(closed, folder, "report.json: 1,073,741,825 bytes are more than a bundle's file may have")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("[" * 2_000_000, "nested more than 32 levels deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested more than 32 levels deep"),
        ('"' + '\\"' * 3_000_000, "no valid JSON"),
        ('{"suite": {"hash": NaN}}', "NaN is no JSON"),
        ('{"suite": 1e999}', "out of range"),
        ('{"suite": ' + "9" * 100_000 + "}", "out of range"),
        ('{"suite": 1, "suite": 2}', "the key 'suite' stands twice"),
        ('{"suite": "\\ud800"}', "no valid UTF-8"),
        ("\xff", "no valid JSON"),
        ("", "no valid JSON"),
        ("null", "not as the schema says"),
        ('{"suite": {"hash": 3}}', "not as the schema says"),
    ],
)
def test_refuses_reports_that_are_none(text: str, pattern: str, closed: Any, tmp_path: Path) -> None:
    folder = closed.write(tmp_path / "b")
    (folder / "report.json").write_text(text, encoding="utf-8")
    closed.seal(folder)
    quickly(closed, folder, pattern)


def test_a_challenge_makes_a_witness(closed: Any, tmp_path: Path) -> None:
    folder = closed.write(tmp_path / "b")
    assert closed.verify(folder, challenge="5f3a").tier == "witnessed"
    assert "not from the challenge" in closed.refusals(folder, challenge="5f3b")
    assert "an empty challenge" in closed.refusals(folder, challenge="")


def test_levels_that_were_not_judged_anew_are_named(closed: Any, tmp_path: Path) -> None:
    outcome = closed.verify(closed.write(tmp_path / "b"), levels=["blocks"])
    assert outcome.accepted
    assert (outcome.recomputed, outcome.left) == (0, ("ops",))


def test_a_failing_run_is_accepted_as_what_it_is(closed: Any, tmp_path: Path) -> None:
    """Accepted means consistent; the verdict stands in the report."""
    told = closed.report()
    case(told).update(
        facts={"lost": "the worker hung"}, outputs={}, state="fail", reason="the worker hung", coverage=[]
    )
    told["workers"] = {"started": 2, "lost": 1}
    tensors = {k: v for k, v in closed.tensors.items() if not k.startswith("linear[bf16,small]/")}
    closed_cases = [c for c in closed.result.records if c["id"] != "linear[bf16,small]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(closed), "result_cases", lambda self: closed_cases)
        outcome = closed.verify(closed.forge(told, tmp_path / "b", tensors=tensors))
    assert [str(f) for f in outcome.findings] == []
    assert outcome.report["verdict"]["word"] == "not certified"
    assert "1 of 7 failed: linear[bf16,small]" in outcome.report["verdict"]["sentence"]


def test_no_folder_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        verify.verify(tmp_path / "nowhere")


def test_an_empty_folder_is_refused(closed: Any, tmp_path: Path) -> None:
    assert "MANIFEST.json: it is missing" in closed.refusals(tmp_path)


def test_the_command(
    closed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "committed", lambda: closed.references)
    folder = closed.write(tmp_path / "b")
    assert main(["verify", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "is certified, self-tested" in " ".join(said.split())
    assert "Accepted: 7 cases judged anew" in said
    assert "not signed" in said
    assert main(["verify", str(folder), "--challenge", "00", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["accepted"], told["tier"]) == (False, None)
    assert "not from the challenge" in told["findings"][0]
    assert main(["verify", str(folder), "--challenge", "5F3A"]) == 0, "certify takes either case, too"
    assert "witnessed" in capsys.readouterr().out
    (folder / "junit.xml").write_text("\x1b[31m")
    assert main(["verify", str(folder)]) == 1
    assert "Refused: 1 finding" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert main(["verify", str(folder), "--levels", "op"]) == 2
    assert main(["verify", str(folder), "--reproduced", str(folder)]) == 2


def test_hostile_text_does_not_reach_the_terminal(closed: Any, tmp_path: Path) -> None:
    told = closed.report()
    told["backend"]["emulated"] = "\x1b[2J\x1b[32mAccepted\n\u202e"
    found = closed.verify(closed.forge(told, tmp_path / "b"))
    assert all(str(finding).isprintable() for finding in found.findings)
    assert not found.accepted


def test_another_precision_of_references_is_refused(closed: Any, tmp_path: Path) -> None:
    """Bounds follow from the suite's reference errors, never from the bundle."""
    small = {
        name: {o: type(e)(e.norm / 100, e.worst / 100, e.gain / 100, e.misrounded, e.count) for o, e in rows.items()}
        for name, rows in closed.references.entries.items()
    }
    folder = closed.write(tmp_path / "b")
    outcome = verify.verify(folder, references=references.References(small))
    assert not outcome.accepted


def test_the_suite_of_a_bundle_is_the_installed_one(closed: Any) -> None:
    assert closed.report()["suite"]["hash"] == suite.suite_hash()
    assert torch.is_tensor(next(iter(closed.tensors.values())))


def test_what_realtime_finds_refuses_the_bundle(closed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A speed above its ceilings, say; the rules themselves are tested with the level."""
    asked: list[Any] = []

    def check(section: Any, told: Any) -> list[str]:
        asked.append((section, told["cases"][0]["id"]))
        return ["99 FPS are above what the measured ceilings allow"]

    monkeypatch.setattr(verify.realtime, "check", check)
    assert "realtime: 99 FPS are above" in closed.refusals(closed.write(tmp_path / "b"))
    assert asked == [(None, closed.cases[0].id)]


def test_weights_of_the_published_size_need_their_memory(closed: Any) -> None:
    told = closed.report() | {"realtime": {"size": "14b"}}
    told["suite"]["levels"] = told["scope"]["levels"] = ["ops", "blocks", "model", "pipeline", "realtime"]
    told["backend"]["device"]["memory"] = 24_000_000_000
    assert [where for where, _ in contradictions(told)] == ["backend.device.memory"]
    told["backend"]["device"]["memory"] = 80_000_000_000
    assert contradictions(told) == []


def test_outputs_beyond_what_the_records_name_are_not_read(closed: Any, tmp_path: Path) -> None:
    folder = closed.write(tmp_path / "b")
    os.truncate(folder / "outputs" / "ops.safetensors", 1 << 29)  # sparse
    told = json.loads((folder / manifest.MANIFEST).read_text())
    told["files"]["outputs/ops.safetensors"]["bytes"] = 1 << 29
    (folder / manifest.MANIFEST).write_text(json.dumps(told))
    found = closed.refusals(folder)
    assert "outputs/ops.safetensors: its SHA-256 is not" in found
    closed.seal(folder)
    assert "outputs/ops.safetensors: 536,870,912 bytes; at most" in closed.refusals(folder)


@pytest.mark.parametrize(("part", "accepted"), [(0.3, True), (3.0, False), (-3.0, False)])
def test_figures_may_differ_as_hosts_do_and_no_further(
    part: float, accepted: bool, closed: Any, tmp_path: Path
) -> None:
    told = closed.report()
    output = case(told)["outputs"]["o0"]
    output["errors"]["norm"] += part * recheck.HOSTS * output["bounds"]["norm"]
    assert closed.verify(closed.forge(told, tmp_path / "b")).accepted == accepted


def test_counts_are_exact(closed: Any, tmp_path: Path) -> None:
    told = closed.report()
    case(told)["outputs"]["o0"]["errors"]["count"] += 1
    assert "errors.count" in closed.refusals(closed.forge(told, tmp_path / "b"))
