"""The VAE through graphs against diffusers' AutoencoderKLWan, both with the same random weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample
from torch import Tensor, nn

from helios import op
from helios.graph import Graph, Node, Rate
from helios.model.config import VaeConfig
from helios.model.vae import decode_graph, encode_graph
from helios.model.vae_run import VaeRunner, decode_graphs, encode_graphs
from helios.model.vae_split import Split, Tile
from helios.ops.conv import denormalize_latents

TINY = VaeConfig(base_dim=3, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
REAL = VaeConfig(base_dim=8)
WIDER_DECODER = VaeConfig(base_dim=4, decoder_base_dim=6, dim_mult=(1, 2, 2), temperal_downsample=(True, False),
                          scale_factor_spatial=4, scale_factor_temporal=2)  # fmt: skip
BOUND = {torch.float32: 1e-4, torch.float64: 1e-12}


@functools.cache
def oracle(config: VaeConfig, dtype: torch.dtype) -> AutoencoderKLWan:
    torch.manual_seed(0)
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in config.to_dict().items() if k != "_class_name"}
    model = AutoencoderKLWan(**fields).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # gains that are not all 1, biases that are not all small
            weight.add_(torch.randn_like(weight) * (0.2 if name.endswith("gamma") else 0.02))
    return without_rounding(model.to(dtype))


def without_rounding(model: AutoencoderKLWan) -> AutoencoderKLWan:
    """Their upsampler goes through float32 whatever the dtype, which only moves numbers but caps float64 at 1e-8."""
    for module in model.modules():
        if isinstance(module, WanUpsample):
            module.forward = functools.partial(nn.Upsample.forward, module)
    return model


class Interpreter:
    """Runs a graph node after node with the op bodies, and remembers which graphs it ran."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.ran: list[str] = []

    def __call__(self, graph: Graph, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.ran.append(graph.name)
        assert {v.name for v in graph.inputs if v.rate == Rate.STEP} == set(inputs)
        values = {}
        for value in graph.inputs:
            tensor = inputs[value.name] if value.rate == Rate.STEP else self.weights[value.name]
            assert (tuple(tensor.shape), tensor.dtype) == (value.shape, value.dtype), value.name
            values[value.name] = tensor
        with torch.no_grad():
            for node in graph.nodes:
                results = op.get(node.op)(*[_fetch(values, x) for x in node.inputs], **node.attributes)
                results = results if isinstance(results, tuple) else (results,)
                values |= {v.name: r for v, r in zip(node.outputs, results, strict=True)}
        return {name: values[v.name] for name, v in graph.outputs}


def _fetch(values: Mapping[str, Tensor], operand: Any) -> Any:
    if operand is None:
        return None
    return [values[v.name] for v in operand] if isinstance(operand, tuple) else values[operand.name]


def runner(config: VaeConfig, dtype: torch.dtype, split: Split) -> VaeRunner:
    return VaeRunner(config, Interpreter(oracle(config, dtype).state_dict()), dtype=dtype, split=split)


def random(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def denormalized(config: VaeConfig, latents: Tensor) -> Tensor:
    return denormalize_latents(latents, mean=config.latents_mean, std=config.latents_std)


@functools.cache
def decoded(config: VaeConfig, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Normalised latents, and what diffusers decodes from them."""
    latents = random(*shape, dtype=dtype)
    with torch.no_grad():
        return latents, oracle(config, dtype).decode(denormalized(config, latents)).sample


@functools.cache
def encoded(config: VaeConfig, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A video, and the moments that diffusers makes of it."""
    video = random(*shape, dtype=dtype).clamp(-1, 1)
    with torch.no_grad():
        return video, oracle(config, dtype).encode(video).latent_dist.parameters


def require_close(ours: Tensor, theirs: Tensor, bound: float) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    error = ((ours - theirs).norm() / theirs.norm()).item()
    worst = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= bound, f"relative error {error:.3g}, wanted ≤ {bound}"
    assert worst <= bound, f"worst element {worst:.3g} of the largest, wanted ≤ {bound}"


def test_comparison_can_fail() -> None:
    x = torch.ones(4)
    with pytest.raises(AssertionError, match="relative error"):
        require_close(x * 1.001, x, 1e-4)


@pytest.mark.parametrize("group", range(1, 10))
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_decode_in_groups(group: int, dtype: torch.dtype) -> None:
    latents, theirs = decoded(TINY, dtype, (2, 16, 9, 3, 2))
    require_close(runner(TINY, dtype, Split(group)).decode(latents), theirs, BOUND[dtype])


@pytest.mark.parametrize("group", range(1, 10))
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_encode_in_groups(group: int, dtype: torch.dtype) -> None:
    video, theirs = encoded(TINY, dtype, (2, 3, 33, 24, 16))
    require_close(runner(TINY, dtype, Split(group)).moments(video), theirs, BOUND[dtype])


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("config", [REAL, WIDER_DECODER], ids=["published_structure", "wider_decoder"])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_other_structures(config: VaeConfig, group: int, dtype: torch.dtype) -> None:
    factor, time = config.scale_factor_spatial, config.scale_factor_temporal
    run = runner(config, dtype, Split(group))
    latents, theirs = decoded(config, dtype, (2, 16, 3, 3, 5))
    require_close(run.decode(latents), theirs, BOUND[dtype])
    if time != 4:
        return  # the published encoder always takes four frames at a time
    video, theirs = encoded(config, dtype, (2, 3, 2 * time + 1, 3 * factor, 5 * factor))
    require_close(run.moments(video), theirs, BOUND[dtype])


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_one_frame(dtype: torch.dtype) -> None:
    run = runner(REAL, dtype, Split(9))
    latents, frame = decoded(REAL, dtype, (1, 16, 1, 4, 3))
    require_close(run.decode(latents), frame, BOUND[dtype])
    video, moments = encoded(REAL, dtype, (1, 3, 1, 8, 40))
    require_close(run.moments(video), moments, BOUND[dtype])


def test_groups_agree_with_one_pass_in_float64() -> None:
    latents, video = random(1, 16, 5, 2, 3, dtype=torch.float64), random(1, 3, 17, 16, 24, dtype=torch.float64)
    whole = runner(REAL, torch.float64, Split(5))
    for group in (1, 2, 3, 4):
        run = runner(REAL, torch.float64, Split(group))
        require_close(run.decode(latents), whole.decode(latents), 1e-12)
        require_close(run.moments(video), whole.moments(video), 1e-12)


@pytest.mark.parametrize("sampled", [True, False])
def test_posterior(sampled: bool) -> None:
    video, _ = encoded(TINY, torch.float64, (2, 3, 9, 16, 16))
    noise = random(2, 16, 3, 2, 2, dtype=torch.float64, seed=3)
    with torch.no_grad():
        posterior = oracle(TINY, torch.float64).encode(video).latent_dist
    raw = posterior.mean + posterior.std * noise if sampled else posterior.mode()
    ours = runner(TINY, torch.float64, Split(3)).encode(video, noise if sampled else None)
    require_close(denormalized(TINY, ours), raw, 1e-12)


def test_posterior_draws_what_a_generator_gives() -> None:
    video, _ = encoded(TINY, torch.float32, (1, 3, 5, 16, 16))
    with torch.no_grad():
        theirs = oracle(TINY, torch.float32).encode(video).latent_dist.sample(torch.Generator().manual_seed(7))
    noise = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(7))
    require_close(denormalized(TINY, runner(TINY, torch.float32, Split(1)).encode(video, noise)), theirs, 1e-4)


@pytest.mark.parametrize("half", ["decode", "encode"])
def test_bfloat16_is_no_worse_than_diffusers(half: str) -> None:
    """The error of our bfloat16 against float64, with weights rounded alike, stays within 1.5 times theirs."""
    low = oracle(REAL, torch.float32).state_dict()
    low = {name: weight.to(torch.bfloat16) for name, weight in low.items()}
    exact = AutoencoderKLWan.from_config(oracle(REAL, torch.float64).config).double()
    without_rounding(exact).load_state_dict({name: weight.double() for name, weight in low.items()})
    theirs = AutoencoderKLWan.from_config(exact.config).bfloat16()
    theirs.load_state_dict(low)
    run = VaeRunner(REAL, Interpreter(low), dtype=torch.bfloat16, split=Split(2))
    with torch.no_grad():
        if half == "decode":
            latents = random(1, 16, 3, 4, 4, dtype=torch.bfloat16)
            ours = run.decode(latents)
            want = exact.decode(denormalized(REAL, latents.double())).sample
            came = theirs.decode(denormalized(REAL, latents)).sample
        else:
            video = random(1, 3, 9, 32, 32, dtype=torch.bfloat16).clamp(-1, 1)
            ours = run.moments(video)
            want = exact.encode(video.double()).latent_dist.parameters
            came = theirs.encode(video).latent_dist.parameters
    assert ours.dtype == torch.bfloat16
    error, reference = ((x.double() - want).norm() / want.norm() for x in (ours, came))
    assert error <= 1.5 * reference, f"{error:.3g} against {reference:.3g}"


@pytest.mark.parametrize(("height", "width"), [(6, 10), (4, 9), (3, 5)])
@pytest.mark.parametrize("group", [1, 3])
def test_tiles_equal_those_of_diffusers(height: int, width: int, group: int) -> None:
    tile = Tile(size=32, stride=24)
    model = oracle(TINY, torch.float64)
    latents = random(1, 16, 3, height, width, dtype=torch.float64) * 3  # large, so that clipping order shows
    video = random(1, 3, 9, height * 8, width * 8, dtype=torch.float64).clamp(-1, 1)
    model.enable_tiling(32, 32, 24, 24)
    try:
        with torch.no_grad():
            frames = model.decode(denormalized(TINY, latents)).sample
            moments = model.encode(video).latent_dist.parameters
    finally:
        model.disable_tiling()
    run = runner(TINY, torch.float64, Split(group, tile))
    require_close(run.decode(latents), frames, 1e-12)
    require_close(run.moments(video), moments, 1e-12)


@pytest.mark.parametrize("split", [Split(1), Split(2), Split(3), Split(9), Split(2, Tile(32, 24))], ids=str)
def test_plan_holds_exactly_the_graphs_that_run(split: Split) -> None:
    size = {"batch": 1, "height": 48, "width": 80, "dtype": torch.float32, "split": split}
    executor = Interpreter(oracle(TINY, torch.float32).state_dict())
    run = VaeRunner(TINY, executor, dtype=torch.float32, split=split)
    run.decode(random(1, 16, 5, 6, 10, dtype=torch.float32))
    assert set(executor.ran) == set(decode_graphs(TINY, latents=5, **size))
    executor.ran.clear()
    run.encode(random(1, 3, 17, 48, 80, dtype=torch.float32))
    assert set(executor.ran) == set(encode_graphs(TINY, frames=17, **size))


@pytest.mark.parametrize("config", [TINY, REAL, WIDER_DECODER, VaeConfig()], ids=["tiny", "real", "wider", "published"])
def test_weights_are_those_of_diffusers(config: VaeConfig) -> None:
    with torch.device("meta"):
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in config.to_dict().items() if k != "_class_name"}
        theirs = {k: tuple(v.shape) for k, v in AutoencoderKLWan(**fields).state_dict().items()}
    size = {"batch": 1, "height": 16, "width": 16, "dtype": torch.float32}
    frames = 1 + config.scale_factor_temporal  # with fewer, the convolutions over time are not there
    graphs = (decode_graph(config, latents=2, **size), encode_graph(config, frames=frames, **size))
    assert {v.name: v.shape for graph in graphs for v in graph.inputs_at(Rate.WEIGHTS)} == theirs


def tera(nodes: tuple[Node, ...]) -> float:
    return round(sum(op.cost(node).flops for node in nodes) / 1e12, 2)


def test_published_arithmetic() -> None:
    """TFLOP at 384 × 640, which the arithmetic of the published network gives."""
    size: dict[str, Any] = {"batch": 1, "height": 384, "width": 640, "dtype": torch.float32}
    config = VaeConfig()
    assert tera(decode_graph(config, latents=9, **size).nodes) == 69.26
    assert tera(decode_graph(config, latents=1, **size).nodes) == 2.66
    assert tera(decode_graph(config, latents=1, first=False, **size).nodes) == 8.32
    assert tera(encode_graph(config, frames=33, **size).nodes) == 41.18
    assert tera(encode_graph(config, frames=1, **size).nodes) == 1.66
