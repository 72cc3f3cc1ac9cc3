"""The oracle's walk over graphs, golden inputs, and the pieces that a graph is cut into."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from helios.backend import ReferenceBackend
from helios.errors import InputError
from helios.graph import Rate
from helios.lower import lower
from helios.program import EMPTY
from helios_conformance.budget import measure
from helios_conformance.checks.blocks import blocks, samplers, vaes
from helios_conformance.checks.model import trajectories
from helios_conformance.draws import Root
from helios_conformance.golden import Call, Interpreter, Scene, calls_of, golden, reference, rounded, working
from helios_conformance.graph_runs import longest_sum
from helios_conformance.scenes.vae import VaeBlocks, VaeVideo, blocks_of

ROOT = Root(3)
SCENES: dict[str, Scene] = {
    "block": blocks()["tiny,first_batch2"],
    "amplified": blocks()["tiny,amplified"],
    "trajectory": trajectories()["tiny,mid"],
    "decode": vaes()["decode_groups"],
    "encode": vaes()["encode_groups"],
    "vae_blocks": vaes()["encode_blocks_next"],
    "sampler": samplers()["unipc_pyramid"],
}


@pytest.mark.parametrize("name", SCENES)
def test_exact_operations_that_are_rounded_err_as_the_working_dtype_does(name: str) -> None:
    scene = SCENES[name]
    oracle, came = golden(scene, ROOT, scene.dtype("bf16")).outputs, rounded(scene, ROOT, "bf16")
    theirs = reference(scene, ROOT, "bf16")
    assert came.keys() == oracle.keys()
    for key, tensor in came.items():
        assert tensor.dtype == theirs[key].dtype
        ours, known = (measure(x, oracle[key]).norm for x in (tensor, theirs[key]))
        # Exact operations err less, never much more: what is left is the rounding that the graph declares.
        assert ours <= 1.3 * known + 1e-12, key
        assert ours > 0.0 or known < 1e-7


def by_backend(scene: Scene, precision: str) -> dict[str, torch.Tensor]:
    """The same calls through ``lower`` on the reference backend."""
    dtype = scene.dtype(precision)
    program = lower(working(scene, precision), ReferenceBackend())
    program.load(scene.weights(dtype))
    outputs = {}
    for call in calls_of(scene, ROOT, dtype):
        context = EMPTY
        for inputs in call.bound.values():
            context = context | program.bind(inputs)
        out = program.run(call.entry, call.inputs, context)
        outputs.update({f"{call.name}.{name}": tensor for name, tensor in out.items()})
    return outputs


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8-attention", "fp8-weights"])
@pytest.mark.parametrize("name", SCENES)
def test_the_walk_gives_what_the_reference_backend_gives(name: str, precision: str) -> None:
    scene = SCENES[name]
    if scene.dtype("bf16") == torch.float32 and precision != "fp32":
        pytest.skip("the autoencoder runs in float32")
    ours, theirs = reference(scene, ROOT, precision), by_backend(scene, precision)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor, theirs[key]), key


def test_a_golden_run_is_the_same_twice_and_another_for_another_root() -> None:
    scene = SCENES["trajectory"]
    one, other = golden(scene, ROOT, torch.float32), golden(scene, Root(3, "nonce"), torch.float32)
    again = golden(trajectories()["tiny,mid"], Root(3), torch.float32)
    assert [c.name for c in one.calls] == [c.name for c in other.calls] == [c.name for c in again.calls]
    assert all(torch.equal(one.outputs[key], again.outputs[key]) for key in one.outputs)
    drawn = [call for call in one.calls if call.entry.startswith("denoise")]
    assert drawn
    twins = {call.name: call for call in other.calls}
    assert not any(torch.equal(c.inputs["sample"], twins[c.name].inputs["sample"]) for c in drawn)


def test_inputs_are_numbers_of_the_working_dtype() -> None:
    for call in golden(SCENES["trajectory"], ROOT, torch.bfloat16).calls:
        if call.entry.startswith("denoise"):
            assert call.inputs["sample"].dtype == torch.bfloat16
            for inputs in call.bound.values():
                assert all(torch.equal(x, x.bfloat16().to(x.dtype)) for x in inputs.values())


def test_a_trajectory_is_forced_on_every_call() -> None:
    """Each step starts from the oracle's answer to the one before, rounded."""
    run = golden(trajectories()["tiny,distilled"], ROOT, torch.float32)
    inputs = {call.name: call.inputs for call in run.calls}
    came = run.outputs["c0.shrink.sample"].float()
    assert torch.equal(inputs["c0.s0.k0.cond"]["sample"], came)
    assert torch.equal(inputs["c0.s0.k0.step"]["velocity"], run.outputs["c0.s0.k0.cond.velocity"].float())
    last = [call for call in run.calls if call.name.startswith("c1")][-2]
    assert set(last.bound) == {"prompt", "history1"}
    made = run.outputs["c0.s2.k0.step.sample"].float()
    short = last.bound["history1"]["history_short"]
    assert torch.equal(short, torch.cat([made[:, :, :1], made[:, :, -1:]], 2))  # the anchor, and the newest frame


def test_a_wrong_shape_is_refused() -> None:
    scene = SCENES["sampler"]
    call = calls_of(scene, ROOT, torch.float32)[0]
    bent = Call(call.name, call.entry, {name: x[:, :, :1] for name, x in call.inputs.items()})
    with pytest.raises(InputError, match="has shape"):
        Interpreter(scene.graphs(torch.float32), scene.weights(torch.float32)).run(bent)


@pytest.mark.parametrize("half", ["decode", "encode"])
@pytest.mark.parametrize("at", [0, 1])
def test_the_pieces_are_the_graph(half: str, at: int) -> None:
    """Fed with what the oracle has at their borders, they end where the whole graph ends, and leave out no weight."""
    video = vaes()[f"{half}_groups"]
    assert isinstance(video, VaeVideo)
    whole = video.graph(at, torch.float64)
    pieces = blocks_of(whole)
    assert len({piece.name for piece in pieces}) == len(pieces) >= 12
    read = {v.name for piece in pieces for v in piece.inputs_at(Rate.WEIGHTS)}
    assert read == {v.name for v in whole.inputs_at(Rate.WEIGHTS)}
    run = golden(VaeBlocks(video, at), ROOT, torch.float64)
    name, value = next((n, v) for n, v in whole.outputs if not n.startswith("cache."))
    (came,) = [x for key, x in run.outputs.items() if key.endswith(f".{value.name}")]
    wanted = golden(video, ROOT, torch.float64).outputs[f"group{at}.{name}"]
    assert torch.allclose(came, wanted, rtol=1e-12, atol=1e-12)


def test_the_longest_sum() -> None:
    scene = blocks()["tiny,stages"]
    graph = scene.graphs(torch.float32)["stage2"]
    assert longest_sum(graph) == 16 * 4 * 8 * 8  # a patch of the oldest history
    short = dataclasses.replace(scene, history=False, tokens=4096)
    assert longest_sum(short.graphs(torch.float32)["stage2"]) == 4096  # keys of the text
