"""Models of free size: one export for many heights, widths and lengths of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from onnx_stranger import Stranger

from helios.backend import ReferenceBackend
from helios.cli import main
from helios.graph import Rate
from helios.model.presets import SIZES
from helios.pipeline.entries import PARTS, BothWeights, Entries
from helios.pipeline.model import sized_model
from helios.precision import precision


def relative(came: Any, wanted: torch.Tensor) -> float:
    exact = wanted.double()
    return float((torch.from_numpy(came).double() - exact).norm() / exact.norm())


# In the tiny VAE some norms are over one channel, which leaves a sign: a rounding apart, and it is the other one.
WIDER = dataclasses.replace(SIZES["tiny"], vae=dataclasses.replace(SIZES["tiny"].vae, base_dim=8))


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stranger]:
    """Everything, open in height, width and text."""
    out = tmp_path_factory.mktemp("free") / "out"
    words = ["export", "onnx", "--size", "tiny", "--height", "64", "--width", "64", "--text-tokens", "8"]
    words += ["--precision", "fp32", "--dynamic", "height,width,text", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", WIDER)
        assert main([*words, *(word for part in PARTS for word in ("--part", part))]) == 0
        yield Stranger(out)


def test_the_manifest_says_which_sizes_are_allowed(free: Stranger) -> None:
    assert free.told["sizes"]["dynamic"] == {
        "height": {"multiple": 64, "largest": 8192},
        "width": {"multiple": 64, "largest": 8192},
        "text": {"multiple": 1},
    }
    assert (free.told["sizes"]["height"], free.told["sizes"]["text_tokens"]) == (64, 8)
    shapes = {told["name"]: told["shape"] for told in free.models["denoise.2"]["inputs"]}
    assert [isinstance(size, str) for size in shapes["sample"]] == [False, False, False, True, True]
    assert [told["source"] for told in free.models["weights"]["inputs"]] == []


@pytest.mark.parametrize(("height", "width", "tokens"), [(64, 64, 8), (192, 64, 8), (128, 192, 21)])
def test_models_of_free_size_give_what_the_reference_gives_at_each(
    free: Stranger, height: int, width: int, tokens: int
) -> None:
    model = sized_model("tiny")
    asked = Entries(model, height, width, 1, tokens, precision("fp32"), PARTS)
    program = ReferenceBackend().compile(asked.plan())
    program.load(BothWeights(model))
    values = {v.name: v for graph in program.plan.graphs.values() for v in graph.inputs}
    slow = {
        rate: {
            name: torch.randn(values[name].shape, generator=torch.Generator().manual_seed(seed))
            for seed, name in enumerate(sorted(program.input_names(rate)), start=10 * rate)
        }
        for rate in (Rate.PROMPT, Rate.CHUNK)
    }
    context = program.bind(slow[Rate.PROMPT]) | program.bind(slow[Rate.CHUNK])
    given = {name: tensor.numpy() for tensors in slow.values() for name, tensor in tensors.items()}
    held: dict[str, Any] = {}
    for often in ("load", "prompt", "chunk"):
        held = free.phase(often, held, given)
    for entry, graph in program.plan.steps.items():
        generator = torch.Generator().manual_seed(1)
        step = {v.name: torch.randn(v.shape, generator=generator) for v in graph.inputs_at(Rate.STEP)}
        wanted = program.run(entry, step, context)
        came = free.run(entry, held, {**given, **{name: x.numpy() for name, x in step.items()}})
        assert len(came) == len(wanted)
        for mine, theirs in zip(came.values(), wanted.values(), strict=True):
            assert mine.shape == tuple(theirs.shape)
            assert relative(mine, theirs) <= 1e-5, entry
