"""The nodes of the lowered plans: all of them are listed, and what is listed can be drawn and judged."""

from __future__ import annotations

import pytest

from helios import op
from helios.graph import TensorType
from helios_conformance import plan_list, references, suite
from helios_conformance.case import PRECISIONS
from helios_conformance.checks.plan_nodes import describe, inputs
from helios_conformance.draws import Root


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_committed_list_is_that_of_the_plans(precision: str) -> None:
    assert dict(plan_list.committed()[precision]) == plan_list.listed(precision)


@pytest.mark.slow
def test_more_layers_have_no_other_nodes() -> None:
    assert plan_list.listed("bf16", layers=6) == plan_list.committed()["bf16"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_labels_name_their_nodes(precision: str) -> None:
    for label in plan_list.committed()[precision]:
        node = plan_list.shape(precision, label)
        assert node.label == label
        assert label.rpartition("_")[0] == node.op
        assert len(node.types) == len(op.get(node.op).operands)


def test_cases_belong_to_the_full_suite() -> None:
    cases = [c for c in suite.all_cases("bf16") if c.check == "plan_nodes"]
    assert len(cases) > 250
    assert {c.suite for c in cases} == {"full"}
    assert {c.level for c in cases} == {"ops"}
    assert not {c.id for c in cases} & {c.id for c in suite.choose("bf16", "quick")}


def test_the_fused_and_the_core_form_are_both_there() -> None:
    """A backend without a fusion runs the nodes of its composition, at the very same size."""
    ops = {label.rpartition("_")[0] for label in plan_list.committed()["bf16"]}
    assert {"adaln", "layer_norm", "modulate", "qk_norm_rope", "rms_norm", "rope", "linear_gelu", "gelu"} <= ops
    assert {"dmd_step", "unipc_step", "cfg_zero_star", "renoise_upsample", "conv3d", "interleave_frames"} <= ops


def test_operands_are_drawn_as_the_network_has_them() -> None:
    label = next(n for n in plan_list.committed()["bf16"] if n.startswith("qk_norm_rope_"))
    case = suite.find(f"plan[bf16,{label}]")
    given = inputs(case, Root(1))
    types = plan_list.shape("bf16", label).types
    assert [TensorType(tuple(t.shape), t.dtype) for t in given.tensors] == list(types)
    assert float((given.tensors[4].square().sum(-1) - 1).abs().max()) < 1e-6  # turns
    assert 0.9 < float(given.tensors[2].float().mean()) < 1.1  # gains near one


@pytest.mark.parametrize(("operand", "shape", "scale"), [("weight", (8, 16), 0.25), ("weight", (8, 4, 1, 2, 2), 0.25)])
def test_products_keep_the_size_of_their_inputs(operand: str, shape: tuple[int, ...], scale: float) -> None:
    types = plan_list.shape("bf16", next(iter(plan_list.committed()["bf16"]))).types
    assert describe(operand, TensorType(shape, types[0].dtype)).scale == scale


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_node_has_its_reference(precision: str) -> None:
    known = references.committed().entries
    missing = [
        case.id
        for case in suite.all_cases(precision)
        if case.check in ("plan_nodes", "op_values")
        and op.get(case.params.get("op") or plan_list.shape(precision, case.params["node"]).op).kind != "move"
        and case.id not in known
    ]
    assert missing == []
