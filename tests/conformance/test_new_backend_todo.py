"""The to-do list of a backend: what is on it, in which order, and what it is counted from."""

from __future__ import annotations

import doctest
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helios import op
from helios.cli import main
from helios.fit.costs import Setting, vae_flops
from helios.fit.estimate import count_work
from helios.model.presets import SIZES, VARIANTS
from helios_conformance import bundle, scope, suite, todo

BARE: dict[str, Any] = {"fusions": []}


def told(case: str, state: str = "unsupported", **other: Any) -> dict[str, Any]:
    return {"id": case, "level": "ops", "required": True, "state": state} | other


def nothing_runs(precision: str) -> list[dict[str, Any]]:
    """Every required case of an op, but of those without operands, which the host computes."""
    cases = (case for case in suite.all_cases(precision) if case.level == "ops" and case.required)
    return [told(case.id) for case in cases if "node" in case.params or op.get(case.params["op"]).operands]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_shares_of_all_ops_make_one_chunk(precision: str) -> None:
    work = todo.shares(precision)
    assert sum(w.share for w in work.values()) == pytest.approx(1.0)
    assert {op.get(name).kind for name in work} == {"move", "round", "reduce"}, "no fused op was asked for"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_order_is_that_of_the_shares(precision: str) -> None:
    items = todo.items(BARE, precision, nothing_runs(precision))
    assert [item.share for item in items] == sorted((item.share for item in items), reverse=True)
    assert items[0].op == "linear"
    assert {item.op for item in items[:3]} == {"linear", "attention", "conv3d"}
    core = {name for name in scope.ops(precision) if op.get(name).kind != "fused"}
    assert {item.op for item in items} == {name for name in core if op.get(name).operands}


def test_a_quantised_precision_asks_for_its_products_beside_all_else() -> None:
    items = todo.items(BARE, "fp8", nothing_runs("fp8"))
    usual = {item.op for item in todo.items(BARE, "bf16", nothing_runs("bf16"))}
    assert {item.op for item in items} == usual | {"quantize_rows", "scaled_linear"}
    found = {item.op: item for item in items}
    assert found["scaled_linear"].nodes > found["linear"].nodes, "only the first and the last block keep theirs"
    assert found["scaled_linear"].share > 2 * found["linear"].share
    assert found["scaled_linear"].largest.startswith("float8_e4m3fn[1,11040,")
    assert found["scaled_linear"].case == "scaled_linear[fp8,small]"


def test_each_item_says_where_to_begin() -> None:
    items = {item.op: item for item in todo.items(BARE, "bf16", nothing_runs("bf16"))}
    assert all(item.case.startswith((f"{item.op}[", "plan[")) for item in items.values())
    no_run_has = {"expand", "pad_replicate", "sample_posterior", "scale_history_keys"}
    assert {name for name, item in items.items() if not item.largest} == no_run_has
    assert items["linear"].case == "linear[bf16,small]"
    assert items["linear"].largest == "bf16[1,11040,5120], bf16[13824,5120], bf16[13824]"
    assert items["conv3d"].largest.startswith("fp32["), "the VAE computes in float32 in every precision"
    assert items["cfg_zero_star"].nodes == 0, "another variant's"
    assert items["cfg_zero_star"].largest.startswith("bf16[1,16,9,48,80]")
    assert suite.find(items["attention"].case).params["op"] == "attention"


def test_the_work_is_that_of_the_estimate() -> None:
    """FLOPs decide the products: with them alone, the shares of products are those of the counted work."""
    work = count_work(Setting(SIZES["14b"], VARIANTS["distilled"]))
    transformer = sum(work.step_flops) + work.chunk_flops
    vae = vae_flops(work.setting)
    shares = todo.shares("bf16")
    assert shares["linear"].share > 0.4
    ratio = shares["conv3d"].share / (shares["linear"].share + shares["attention"].share)
    assert ratio == pytest.approx(2 * vae / transformer, rel=0.05)


def test_a_view_takes_no_time_and_a_copy_does() -> None:
    shares = todo.shares("bf16")
    assert [shares[name].share for name in ("reshape", "narrow", "unbind", "split_heads")] == [0.0] * 4
    assert shares["pad_zero"].share > 0.01
    assert shares["reshape"].nodes > 100


def test_the_example_of_operands_holds() -> None:
    failed, attempted = doctest.testmod(todo)
    assert attempted > 0
    assert failed == 0


def test_what_runs_fused_is_counted_fused() -> None:
    shares = todo.shares("bf16", frozenset({"linear_gelu"}))
    assert "gelu" not in shares
    assert shares["linear_gelu"].share > 0.1
    case = told("linear_gelu[bf16,small]")
    assert [item.op for item in todo.items({"fusions": ["linear_gelu"]}, "bf16", [case])] == ["linear_gelu"]
    assert todo.items(BARE, "bf16", [case]) == [], "it lacks linear or gelu, and those have cases of their own"
    wrong = told("linear_gelu[bf16,small]", "fail")
    assert [item.state for item in todo.items(BARE, "bf16", [wrong])] == ["fail"], "its parts ran, and it was wrong"


@pytest.mark.parametrize(
    "case",
    [
        told("silu[bf16,small]", "pass"),
        told("silu[bf16,small]", "not_run"),
        told("silu[bf16,small]", "fail", required=False),
        told("block[bf16,tiny,stages]", "fail", level="blocks"),
    ],
)
def test_only_required_cases_of_ops_that_ran_or_could_not_count(case: dict[str, Any]) -> None:
    assert todo.items(BARE, "bf16", [case]) == []


def test_cases_of_plan_nodes_belong_to_their_op() -> None:
    label = next(case.id for case in suite.all_cases("bf16") if case.id.startswith("plan[bf16,gelu_"))
    (item,) = todo.items(BARE, "bf16", [told("gelu[bf16,small]", "pass"), told(label, "fail")])
    assert (item.op, item.case, item.state, item.cases) == ("gelu", label, "fail", 1)


# --- as certify tells it --------------------------------------------------------------------------------------------


@pytest.fixture
def certified(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    meet_strangers: Callable[[pytest.MonkeyPatch], None],
) -> Callable[..., str]:
    """Runs certify on a stranger; what it printed."""
    meet_strangers(monkeypatch)
    monkeypatch.setattr(bundle.graphs, "of_spec", lambda *given: "left out by a test")

    def run(spec: str, code: int, *arguments: str) -> str:
        assert main(["certify", "--backend", spec, "--out", str(tmp_path / "out"), *arguments]) == code
        return capsys.readouterr().out

    return run


def test_certify_tells_what_is_to_do(certified: Callable[..., str]) -> None:
    out = certified("zero", 1, "--filter", "*[fp32,small]", "--level", "ops")
    lines = out.splitlines()
    ranks = [line.split()[2] for line in lines if re.match(r" *\d+\.\d% ", line)]
    assert ranks[:2] == ["linear", "attention"]
    assert len(ranks) == 10
    assert any(line.startswith("and ") and line.endswith(" more") for line in lines)
    assert "helios certify --backend zero --filter 'linear[fp32,small]'" in lines
    assert "a prediction" in " ".join(out.split())


def test_what_fails_is_to_do_like_what_is_absent(certified: Callable[..., str]) -> None:
    data = json.loads(certified("wild", 1, "--filter", "gelu[fp32,small]", "--filter", "add[fp32,small]", "--json"))
    (item,) = data["todo"]
    assert (item["op"], item["state"], item["case"]) == ("gelu", "fail", "gelu[fp32,small]")
    assert 0.01 < item["share"] < 0.02


@pytest.mark.parametrize(("spec", "code"), [("right", 0), ("noprobe", 1)])
def test_nothing_is_to_do_where_all_is_well_or_nothing_is_known(
    spec: str, code: int, certified: Callable[..., str]
) -> None:
    assert "To do" not in certified(spec, code, "--filter", "add[fp32,small]")
