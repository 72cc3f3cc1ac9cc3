"""Graphs and weights on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helios import serialize
from helios.backend import ReferenceBackend
from helios.errors import GraphError
from helios.graph import Builder, Graph, Rate
from helios.lower import lower
from helios.ops import OPSET
from helios.ops.linear import linear
from helios.ops.pointwise import silu
from helios.passes import build_plan

F32, BF16 = torch.float32, torch.bfloat16


def graph(name: str = "g", rows: int = 2) -> Graph:
    with Builder(name) as build:
        x = build.input("x", (rows, 3), BF16, Rate.STEP)
        w = build.input("w", (4, 3), BF16, Rate.WEIGHTS)
        scale = silu(silu(build.input("b", (4,), BF16, Rate.WEIGHTS)))
        build.output("y", linear(x, w, scale))
    return build.graph()


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn((8, 3), generator=generator).to(BF16)
    return {"w": whole[::2], "b": whole.flatten()[:4]}  # views of one another, not contiguous


def test_graphs_and_weights_come_back(tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    graphs = {"a": graph("a", 2), "b": graph("b", 5)}
    serialize.save(path, graphs, weights())
    saved = serialize.load(path)
    assert dict(saved.graphs) == graphs
    assert saved.plan is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["two.json", "two.safetensors"]
    for name, tensor in weights().items():
        assert torch.equal(saved.read(name), tensor)


def test_a_plan_comes_back_and_runs_to_the_same_bits(tmp_path: Path) -> None:
    plan = build_plan({"a": graph("a")})
    serialize.save(tmp_path / "plan.json", plan, weights())
    saved = serialize.load(tmp_path / "plan.json")
    assert saved.plan is not None
    assert saved.plan == plan
    assert saved.plan.digest == plan.digest
    backend = ReferenceBackend()
    x = torch.ones((2, 3), dtype=BF16)
    results = []
    for program in (backend.compile(saved.plan), lower({"a": graph("a")}, backend)):
        program.load(saved)
        results.append(program.run("a", {"x": x})["y"])
    assert torch.equal(*results)


def test_without_weights_there_is_one_file(tmp_path: Path) -> None:
    serialize.save(tmp_path / "g.json", {"g": graph()})
    assert [p.name for p in tmp_path.iterdir()] == ["g.json"]
    saved = serialize.load(tmp_path / "g.json")
    with pytest.raises(GraphError, match="hold no 'w'"):
        saved.read("w")


def test_the_text_form_stands_in_the_json_line_by_line(tmp_path: Path) -> None:
    serialize.save(tmp_path / "g.json", {"g": graph()})
    data = json.loads((tmp_path / "g.json").read_text())
    assert data["graphs"]["g"] == str(graph()).splitlines()
    assert data["opset"] == OPSET


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        serialize.save(tmp_path / name / "g.json", {"g": graph()}, dict(sorted(weights().items(), reverse=name == "b")))
    for file in ("g.json", "g.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def change(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update({key: value})


def change_line(data: dict[str, Any]) -> None:
    lines = data["graphs"]["g"]
    lines[1] = lines[1].replace("[2,3]", "[9,3]")


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (change("opset", OPSET + 1), f"written for opset {OPSET + 1}, this Helios has {OPSET}"),
        (change("format", "onnx"), "its format is not 'helios-graphs-1'"),
        (change("digest", "0" * 64), "do not fit their digest"),
        (change_line, "do not fit their digest"),
        (change("graphs", []), "do not fit their digest"),
        (change("weights", {"file": "../g.safetensors", "sha256": ""}), "and not beside it"),
        (change("weights", 3), "and not beside it"),
        (change("weights", {"file": "g.safetensors", "sha256": "0" * 64}), "g.safetensors does not fit its digest"),
    ],
)
def test_damaged_json(tmp_path: Path, edit: Callable[[dict[str, Any]], None], text: str) -> None:
    path = tmp_path / "g.json"
    serialize.save(path, {"g": graph()}, weights())
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(GraphError) as refused:
        serialize.load(path)
    assert text in str(refused.value)


@pytest.mark.parametrize("lines", [None, 7, [["graph"]], "graph g {"])
def test_graphs_that_are_no_lists_of_lines(tmp_path: Path, lines: Any) -> None:
    """With a digest that fits: the file was made so."""
    path = tmp_path / "g.json"
    texts = {"graphs": {"g": lines}}
    data = {"format": serialize.FORMAT, "opset": OPSET, "digest": serialize._digest(texts), **texts}
    path.write_text(json.dumps(data))
    with pytest.raises(GraphError):
        serialize.load(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"a": 1}'])
def test_other_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "g.json"
    path.write_text(content)
    with pytest.raises(GraphError, match=r"g\.json"):
        serialize.load(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    with pytest.raises(GraphError, match=r"cannot read .*No such file"):
        serialize.load(path)
    with pytest.raises(GraphError, match=r"does not end in \.json"):
        serialize.load(tmp_path / "g.safetensors")
    serialize.save(path, {"g": graph()}, weights())
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(GraphError, match=r"cannot read .*g\.safetensors"):
        serialize.load(path)


def test_damaged_weights(tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    serialize.save(path, {"g": graph()}, weights())
    file = path.with_suffix(".safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(GraphError, match="does not fit its digest"):
        serialize.load(path)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"v": torch.ones(4)}, "no graph has a weight 'v'"),
        ({"x": torch.ones((2, 3), dtype=BF16)}, "no graph has a weight 'x'"),
        ({"b": torch.ones(5, dtype=BF16)}, "weight 'b' is bfloat16[5], the graphs take bfloat16[4]"),
        ({"b": torch.ones(4)}, "weight 'b' is float32[4], the graphs take bfloat16[4]"),
    ],
)
def test_wrong_weights_are_not_written(tmp_path: Path, wrong: dict[str, torch.Tensor], text: str) -> None:
    with pytest.raises(GraphError) as refused:
        serialize.save(tmp_path / "g.json", {"g": graph()}, wrong)
    assert text in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_place(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="cannot write"):
        serialize.save(tmp_path / "no" / "g.json", {"g": graph()})


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A pickle under the name of the weights, with a digest that fits, is refused."""
    path = tmp_path / "g.json"
    serialize.save(path, {"g": graph()}, weights())
    file = path.with_suffix(".safetensors")
    torch.save(weights(), file)
    data = json.loads(path.read_text())
    data["weights"]["sha256"] = serialize._file_digest(file)
    path.write_text(json.dumps(data))
    with pytest.raises(GraphError, match=r"cannot read .*g\.safetensors"):
        serialize.load(path)
