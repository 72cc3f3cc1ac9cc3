"""How many bytes a run expects its weights to take: what its plan counts, and what a program then holds."""

from __future__ import annotations

import pytest

import helios
from helios.backend import ReferenceBackend
from helios.fit.costs import Setting
from helios.fit.estimate import count_work
from helios.lower import lower
from helios.model.presets import SIZES, VARIANTS
from helios.model.random_weights import RandomWeights
from helios.model.shapes import transformer_shapes
from helios.model.transformer import DenoiseShape, HistoryShape, denoise_graph
from helios.passes.quantize import held_bytes, quantize
from helios.precision import PRECISIONS

NAMES = ("bf16", "fp8", "fp8-attention", "fp8-weights")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_expects_what_is_predicted_of_the_published_size(name: str) -> None:
    """On shapes: no weight is made."""
    run = helios.load(size="14b", variant="distilled", backend="reference", precision=name)
    setting = Setting(SIZES["14b"], VARIANTS["distilled"], precision=PRECISIONS[name])
    assert run._room[0] == pytest.approx(count_work(setting).weights, rel=0.01)
    assert run._room[0] == pytest.approx(28.6e9 if name == "bf16" else 15.4e9, rel=0.01)


def held(name: str) -> int:
    """Bytes of a program's weights on the reference backend; mini, one step's graph."""
    config, precision = SIZES["mini"].transformer, PRECISIONS[name]
    shape = DenoiseShape(8, 8, text_tokens=8, history=HistoryShape(8, 8))
    graph = denoise_graph(config, shape, dtype=precision.dtype, name="step")
    program = lower({"step": quantize(graph, precision)[0]}, ReferenceBackend())
    program.load(RandomWeights(transformer_shapes(config), seed=0))
    return sum(tensor.nbytes for tensor in program.weights.values())


@pytest.fixture(scope="module")
def usual() -> int:
    return held("bf16")


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_program_saves_what_is_expected_to_the_byte(name: str, usual: int) -> None:
    """Also without ``packed_linear``, which the reference does not list: a weight is widened where it is used."""
    assert "packed_linear" not in ReferenceBackend.fusions
    shapes = transformer_shapes(SIZES["mini"].transformer)
    expected = held_bytes(shapes, PRECISIONS["bf16"]) - held_bytes(shapes, PRECISIONS[name])
    assert usual - held(name) == expected > 0


def test_what_is_kept_in_float32_is_little(usual: int) -> None:
    """The embedding of time steps and the modulation tables are; they are counted as the working dtype."""
    shapes = transformer_shapes(SIZES["mini"].transformer)
    assert usual == pytest.approx(held_bytes(shapes, PRECISIONS["bf16"]), rel=0.02)


def test_the_blocks_at_both_ends_are_not_counted_as_quantised() -> None:
    shapes = {f"blocks.{i}.ffn.fc.weight": (10, 100) for i in range(4)} | {"proj_out.weight": (10, 100)}
    assert held_bytes(shapes, PRECISIONS["bf16"]) == 5 * 2000
    assert held_bytes(shapes, PRECISIONS["fp8"]) == 3 * 2000 + 2 * (1000 + 10 * 4)
    few = {name: shape for name, shape in shapes.items() if name[7] in "01"}  # too few to keep any
    assert held_bytes(few, PRECISIONS["fp8-weights"]) == 2 * (1000 + 10 * 4)
