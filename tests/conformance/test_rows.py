"""The oracle of chosen elements is the whole oracle at those elements."""

from __future__ import annotations

import math

import pytest
import torch

import helios.ops  # noqa: F401  (registers the opset)
from helios import op
from helios_conformance import rows, selection
from helios_conformance.draws import Root, make_sample
from helios_conformance.node_values import NodeValues
from helios_conformance.one_node import run_body, widened
from helios_conformance.plan_list import committed, shape
from helios_conformance.selection import Selection

CASES = [
    (name, sample.name)
    for name in sorted(rows.RESTRICTED)
    for sample in op.get(name).samples()
    if not sample.big and not sample.name.startswith("long")
]


def given(name: str, case: str, dtype: torch.dtype) -> NodeValues:
    sample = next(s for s in op.get(name).samples() if s.name == case)
    return NodeValues(op.get(name), make_sample(sample, dtype, Root(5), name, case), sample.attrs)


def some_of(node: NodeValues, output: str, seed: int) -> Selection:
    """Two thirds of the rows and of the columns."""
    numel = node.outputs[output].numel
    matrix = selection.as_matrix(torch.empty(node.outputs[output].shape, device="meta"), seen(node, output))
    assert math.prod(matrix.shape) == numel
    draw = torch.Generator().manual_seed(seed)
    picked = [torch.randperm(n, generator=draw)[: max(1, 2 * n // 3)].sort().values for n in matrix.shape]
    return Selection(*picked)


def seen(node: NodeValues, output: str) -> selection.Layout:
    return rows.layout(node.record.name, node.tensors, node.attrs, output)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_chosen_elements_are_those_of_the_whole(name: str, case: str) -> None:
    node = given(name, case, torch.float32)
    whole = run_body(node.record, *widened(node.tensors, node.attrs))
    for output in node.outputs:
        for seed in range(3):
            chosen = some_of(node, output, seed)
            came = rows.take(node.record, node.tensors, node.attrs, output, chosen, wide=True)
            exact = whole[output].double()  # what is quantised is e4m3 in the oracle, too
            wanted = chosen.take(selection.as_matrix(exact, seen(node, output)))
            assert came.dtype == torch.float64
            assert came.shape == wanted.shape
            assert float((came - wanted).abs().max()) <= 1e-12 * float(1 + wanted.abs().max())


@pytest.mark.parametrize(("name", "case"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_reference_keeps_the_dtype(name: str, case: str, dtype: torch.dtype) -> None:
    node = given(name, case, dtype)
    for output, type_ in node.outputs.items():
        came = rows.take(node.record, node.tensors, node.attrs, output, some_of(node, output, 1), wide=False)
        assert came.dtype == type_.dtype


def test_a_wrong_token_would_be_seen() -> None:
    """The comparison above is not one of equal rows: another selection gives other numbers."""
    node = given("rms_norm", "small", torch.float32)
    first, second = (
        rows.take(
            node.record, node.tensors, node.attrs, "o0", Selection(torch.tensor([r]), torch.arange(24)), wide=True
        )
        for r in (0, 1)
    )
    assert not torch.equal(first, second)


def test_every_op_with_large_outputs_is_restricted() -> None:
    """Data movement is compared in its own dtype; nothing else may need a float64 copy of a large output."""
    large = set()
    for precision, labels in committed().items():
        for label in labels:
            (node,) = shape(precision, label).graph.nodes
            if op.get(node.op).kind != "move" and max(v.type.numel for v in node.outputs) > 1 << 21:
                large.add(node.op)
    assert {"attention", "conv3d", "linear", "gated_add_adaln"} <= large <= set(rows.RESTRICTED)


def test_segments_and_rims() -> None:
    node = given("gated_add_adaln", "tail", torch.float32)
    assert seen(node, "o0").borders == (0, 3)
    both = given("gated_add_adaln", "batch", torch.float32)
    assert seen(both, "o1").borders == (0, 3, 7, 10)
    assert seen(given("attention", "small", torch.float32), "o0").members == 2
    video = seen(given("conv3d", "causal", torch.float32), "o0")  # [2, 8, 3, 4, 6]
    assert video.row_dims == 2
    assert {0, 5, 18, 23, 48, 71} <= set(video.columns)
