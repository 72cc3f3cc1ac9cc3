"""Cases as files, what comes back from a host without torch, and how that is judged and called."""

from __future__ import annotations

import builtins
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helios.cli.app import main
from helios.errors import InputError
from helios.export.forms import FORMS
from helios_conformance import imported, portable, suite
from helios_conformance.case import Case
from helios_conformance.draws import Root
from helios_conformance.export import export
from helios_conformance.imported import run
from helios_conformance.verdict import judge_run

ROOT = Root(5, "ab" * 8)

SMALL = ("silu[*]", "add[*]", "linear[*]", "narrow[*]")


def cases(*patterns: str, precision: str = "bf16", check: str = "op_values") -> list[Case]:
    found = suite.choose(precision, filters=patterns or SMALL)
    quick = [case for case in found if case.suite == "quick" and case.check == check]
    return [case for case in quick if "long" not in case.id][:12]  # those have thousands of rows


def answer(folder: Path) -> None:
    """Results as a right device gives them: the oracle rounded."""
    for entry in json.loads((folder / "index.json").read_text())["cases"]:
        place = folder / "cases" / entry["folder"]
        told = json.loads((place / "case.json").read_text())
        wide = load_file(place / "expected.safetensors")
        narrow = {
            name: wide[name].to(getattr(torch, dtype)).contiguous() for name, (dtype, _) in told["outputs"].items()
        }
        save_file(narrow, folder / "results" / f"{entry['folder']}.safetensors")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_right_results_pass_and_are_called_imported(tmp_path: Path, precision: str) -> None:
    made = export(tmp_path / "e", cases(precision=precision), ROOT, suite="quick")
    assert len(made.folders) >= 8
    assert made.left_out == []
    answer(tmp_path / "e")
    result = run(tmp_path / "e", tmp_path / "out")
    assert {r["state"] for r in result.records} == {"pass"}
    assert judge_run_of(result)["word"] == "imported"


@pytest.mark.parametrize("form", ["safetensors", "onnx"])
def test_a_quantised_scope_goes_out_and_comes_back(tmp_path: Path, form: str) -> None:
    """With cases of its own and of its working dtype, in one folder."""
    wanted = ["quantize_rows[fp8,odd]", "scaled_linear[fp8,odd]", "linear[bf16,small]"]
    chosen = [suite.find(case) for case in wanted]
    export(tmp_path / "e", chosen, ROOT, suite="quick", precision="fp8", form=form)
    assert json.loads((tmp_path / "e" / "index.json").read_text())["precision"] == "fp8"
    answer(tmp_path / "e")
    result = run(tmp_path / "e", tmp_path / "out")
    assert {r["id"]: r["state"] for r in result.records} == dict.fromkeys(wanted, "pass")
    assert result.setup.precision == "fp8"


def judge_run_of(result: Any) -> dict[str, Any]:
    from helios_conformance import environment

    result.environment = environment.read(result.backend)
    return judge_run(result)


def spoil(folder: Path, change: Any) -> str:
    """Change the results of the first case; its id."""
    entry = json.loads((folder / "index.json").read_text())["cases"][0]
    path = folder / "results" / f"{entry['folder']}.safetensors"
    change(path)
    return str(entry["id"])


def rewrite(change: Any) -> Any:
    def changed(path: Path) -> None:
        save_file(change({name: x.clone() for name, x in load_file(path).items()}), path)

    return changed


def scaled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"o0": tensors["o0"] * 1.02}


@pytest.mark.parametrize(
    ("change", "state", "reason"),
    [
        (rewrite(scaled), "fail", "norm of the error"),
        (rewrite(lambda t: t | {"o0@other": t["o0"].clone()}), "fail", "o0"),
        (rewrite(lambda t: {name: x.float() for name, x in t.items()}), "fail", "wanted bfloat16"),
        (rewrite(lambda t: t | {"o9": t["o0"].clone()}), "fail", "missing or unknown: o9"),
        (rewrite(lambda t: {name: x[..., :1].contiguous() for name, x in t.items()}), "fail", "wanted bfloat16"),
        (rewrite(lambda t: t | {"o0": t["o0"] * float("nan")}), "fail", "finite"),
        (lambda path: path.write_bytes(b"no tensors"), "fail", "cannot be read"),
        (lambda path: path.unlink(), "not_run", "there is no"),
    ],
)
def test_wrong_results_fail_with_the_reason(tmp_path: Path, change: Any, state: str, reason: str) -> None:
    export(tmp_path / "e", cases("silu[*]"), ROOT, suite="quick")
    answer(tmp_path / "e")
    wrong = spoil(tmp_path / "e", change)
    result = run(tmp_path / "e", tmp_path / "out")
    (record,) = [r for r in result.records if r["id"] == wrong]
    assert record["state"] == state
    assert reason in record["reason"]
    assert all(r["state"] == "pass" for r in result.records if r["id"] != wrong)
    assert judge_run_of(result)["word"] == "not certified"


def test_the_command_judges_and_says_imported_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "e", tmp_path / "b"
    words = ["--precision", "fp32", "--filter", "silu", "--filter", "rms_norm", "--seed", "3"]
    assert main(["cases", "export", str(folder), *words]) == 0
    told = capsys.readouterr().out
    assert "it needs the device at hand" in told
    answer(folder)
    (folder / "results" / "about.json").write_text(json.dumps({"device": "<b>A device</b>", "software": "1.0"}))
    assert main(["certify", "--from-results", str(folder), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "imported" in told
    report = json.loads((out / "report.json").read_text())
    assert report["verdict"]["word"] == "imported"
    assert not report["verdict"]["closed"]
    assert report["setup"]["imported"] is True
    assert report["realtime"] is None
    page = (out / "report.html").read_text()
    assert "The results came as files" in page
    assert "&lt;b&gt;A device&lt;/b&gt;" in page
    assert main(["verify", str(out)]) == 0
    assert "imported" in capsys.readouterr().out


def test_a_device_run_cannot_pass_for_imported_nor_the_other_way(tmp_path: Path) -> None:
    from helios_conformance.contradictions import _scope

    export(tmp_path / "e", cases("silu[*]"), ROOT, suite="quick")
    answer(tmp_path / "e")
    result = run(tmp_path / "e", tmp_path / "out")
    judge_run_of(result)
    from helios_conformance import report

    told = report.assemble(result)
    assert [place for place, _ in _scope(told) if "imported" in place] == []
    told["setup"]["imported"] = False
    places = [place for place, _ in _scope(told)]
    assert "setup.imported" in places
    assert any(place.endswith("facts.imported") for place in places)


def test_expected_outputs_and_budgets_are_those_of_the_judgement(tmp_path: Path) -> None:
    (case,) = cases("silu[bf16,odd]") or cases("silu[*]")[:1]
    made = export(tmp_path / "e", [case], ROOT, suite="quick")
    place = tmp_path / "e" / "cases" / made.folders[case.id]
    told, inputs = json.loads((place / "case.json").read_text()), load_file(place / "inputs.safetensors")
    expected = load_file(place / "expected.safetensors")
    wanted = torch.nn.functional.silu(inputs["i0"].double())
    assert torch.allclose(expected["o0"], wanted, rtol=1e-12)
    assert expected["o0"].dtype == torch.float64
    assert told["runs"] == ["", "other"]
    assert set(told["bounds"]) == {"o0", "o0@other"}
    assert 0 < told["bounds"]["o0"]["norm"] < 0.01


SCRIPT = """
import sys
import numpy as np
from helios_results import run

def linear(x, w, b=None):
    y = x.astype(np.float64) @ w.astype(np.float64).T
    return y if b is None else y + b

def compute(case, inputs):
    given = lambda name, run: inputs.get(name + ("@" + run if run else ""))
    out = {}
    for r in case["runs"]:
        x, w, b = given("i0", r), given("i1", r), given("i2", r)
        y = {"silu": lambda: x / (1 + np.exp(-x.astype(np.float64))), "add": lambda: x + w,
             "linear": lambda: linear(x, w, b)}.get(case["op"])
        if y is None:
            return None
        out["o0" + ("@" + r if r else "")] = y().astype(np.float32)
    return out

print(run(sys.argv[1], compute, {"device": "numpy"}), "torch" in sys.modules, "safetensors" in sys.modules)
"""


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_results_from_a_host_with_numpy_alone(tmp_path: Path, precision: str) -> None:
    folder = tmp_path / "e"
    chosen = cases("silu[*]", "linear[*]", precision=precision)
    export(folder, chosen, ROOT, suite="quick")
    script = folder / "mine.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(chosen)), "False", "False"]
    result = run(folder, tmp_path / "out")
    assert [(r["id"], r["reason"]) for r in result.records if r["state"] != "pass"] == []
    assert result.backend["device"]["name"] == "numpy"


def test_numpy_rounds_bfloat16_as_torch_does(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(imported.__file__).parent / "templates" / "export"))
    try:
        import helios_results
    finally:
        sys.path.pop(0)
    x = torch.cat([torch.randn(4096), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1.00390625, 3.0e38])])
    bits = torch.from_numpy(helios_results.narrow(x.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(bits, x.bfloat16())
    assert np.isnan(helios_results.widen(helios_results.narrow(np.array([np.nan], np.float32))))[0]


def test_a_scene_is_exported_with_its_graphs_and_judged(tmp_path: Path) -> None:
    (case,) = suite.choose("fp32", levels=("blocks",), filters=("block[fp32,tiny,no_history]",))
    made = export(tmp_path / "e", [case], ROOT, suite="quick")
    told = json.loads((tmp_path / "e" / "cases" / made.folders[case.id] / "case.json").read_text())
    inputs = load_file(tmp_path / "e" / "cases" / made.folders[case.id] / "inputs.safetensors")
    from helios.graph import Rate, parse

    graphs = {name: parse(text) for name, text in told["graphs"].items()}
    for call in told["calls"]:
        graph = graphs[call["graph"]]
        for value in graph.inputs:
            name = f"weights/{value.name}" if value.rate == Rate.WEIGHTS else call["inputs"][value.name]
            assert tuple(inputs[name].shape) == value.shape
    answer(tmp_path / "e")
    result = run(tmp_path / "e", tmp_path / "out")
    assert [r["reason"] for r in result.records] == [""]
    (tmp_path / "out2").mkdir()
    spoil(tmp_path / "e", rewrite(lambda t: {name: x * 1.01 for name, x in t.items()}))
    (record,) = run(tmp_path / "e", tmp_path / "out2").records
    assert record["state"] == "fail"


def test_what_cannot_leave_is_left_out_with_the_reason(tmp_path: Path) -> None:
    refusals = [c for c in suite.choose("bf16") if portable.of(c, ROOT) is None][:1]
    made = export(tmp_path / "e", [*refusals, *cases("silu[*]")], ROOT, suite="quick", most=1 << 20)
    assert (refusals[0].id, "it needs the device at hand") in made.left_out
    assert json.loads((tmp_path / "e" / "index.json").read_text())["left_out"] == [list(row) for row in made.left_out]
    with pytest.raises(InputError, match="none of these cases"):
        export(tmp_path / "none", refusals, ROOT, suite="quick")
    with pytest.raises(InputError, match="not empty"):
        export(tmp_path / "e", cases("silu[*]"), ROOT, suite="quick")
    with pytest.raises(InputError, match="unknown format"):
        export(tmp_path / "f", cases("silu[*]"), ROOT, suite="quick", form="npz")


def test_large_cases_are_left_out_by_their_size(tmp_path: Path) -> None:
    made = export(tmp_path / "e", cases("silu[*]"), ROOT, suite="quick", most=2000)
    assert made.left_out
    assert "the limit is" in made.left_out[0][1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: index | {"suite_hash": "0" * 64},
        lambda index: index | {"format": 99},
        lambda index: index | {"precision": "fp9"},
        lambda index: index | {"precision": "fp32"},
        lambda index: index | {"nonce": 7},
        lambda index: index | {"cases": [{"id": "silu[bf16,odd]", "folder": "../../etc"}]},
        lambda index: index | {"cases": index["cases"] * 2},
        lambda index: index | {"cases": [{"id": "nobody[bf16,x]", "folder": "a"}]},
        lambda index: [index],
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, damage: Any) -> None:
    export(tmp_path / "e", cases("silu[*]"), ROOT, suite="quick")
    answer(tmp_path / "e")
    index = json.loads((tmp_path / "e" / "index.json").read_text())
    (tmp_path / "e" / "index.json").write_text(json.dumps(damage(index)))
    with pytest.raises(InputError):
        run(tmp_path / "e", tmp_path / "out")


def test_a_folder_that_is_no_export_or_has_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder of exported cases"):
        run(tmp_path, tmp_path / "out")
    export(tmp_path / "e", cases("silu[*]"), ROOT, suite="quick")
    with pytest.raises(InputError, match="holds no result"):
        run(tmp_path / "e", tmp_path / "out")


def standard() -> list[Case]:
    """One small case of every op that has a form in ONNX."""
    found = [c for c in suite.choose("fp32") if c.check == "op_values" and c.params["op"] in FORMS]
    small = {c.params["op"]: c for c in reversed(found) if "long" not in c.id}
    return list(small.values())


def test_onnx_folders_run_in_onnxruntime(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from onnx import numpy_helper

    made = export(tmp_path / "e", standard(), ROOT, suite="quick", form="onnx")
    ran = set()
    for name, folder in made.folders.items():
        place = tmp_path / "e" / "cases" / folder
        model = onnx.load(place / "model.onnx")
        if any(node.domain for node in model.graph.node):
            continue
        session = runtime.InferenceSession(str(place / "model.onnx"), providers=["CPUExecutionProvider"])
        for data in sorted(place.glob("test_data_set_*")):
            protos = [onnx.load_tensor(p) for p in sorted(data.glob("input_*.pb"))]
            wanted = [onnx.load_tensor(p) for p in sorted(data.glob("output_*.pb"))]
            if any(p.data_type == onnx.TensorProto.BFLOAT16 for p in (*protos, *wanted)):
                continue
            came = session.run(None, {p.name: numpy_helper.to_array(p) for p in protos})
            # An angle of 999 is known to half of 6.1e-5 in float32, and so is the frequency that makes it.
            near = 6.1e-5 if name.startswith("timestep_embedding") else 2e-5
            for proto, array in zip(wanted, came, strict=True):
                np.testing.assert_allclose(array, numpy_helper.to_array(proto), rtol=2e-5, atol=near, err_msg=name)
            ran.add(name.partition("[")[0])
    assert ran == {case.params["op"] for case in standard()}


def test_ops_without_a_standard_form_are_nodes_of_our_domain(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    chosen = [suite.find("scaled_linear[fp8,odd]")]
    made = export(tmp_path / "e", chosen, ROOT, suite="quick", precision="fp8", form="onnx")
    model = onnx.load(tmp_path / "e" / "cases" / next(iter(made.folders.values())) / "model.onnx")
    (node,) = model.graph.node
    assert (node.domain, node.op_type) == ("ai.helios", "scaled_linear")
    assert [a.name for a in node.attribute] == ["dtype"]


def test_without_onnx_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any, **named: Any) -> Any:
        if name == "onnx":
            raise ImportError("No module named 'onnx'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match="pip install onnx"):
        export(tmp_path / "e", cases("silu[*]"), ROOT, suite="quick", form="onnx")
    assert not (tmp_path / "e").exists()


def test_an_export_is_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(tmp_path / name, cases("silu[*]"), ROOT, suite="quick")
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert len(files) > 5
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    shutil.rmtree(tmp_path / "a")
