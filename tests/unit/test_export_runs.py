"""Exported models, run from their manifest alone in ONNX Runtime, give what the reference backend's program gives."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_stranger import Stranger
from torch import Tensor

from helios.backend import ReferenceBackend
from helios.export.emitter import Options
from helios.export.folder import export
from helios.export.manifest import About
from helios.graph import Rate
from helios.model.presets import SIZES
from helios.model.random_weights import RandomWeights
from helios.model.shapes import transformer_shapes, vae_shapes
from helios.model.vae_run import VaeRunner
from helios.model.vae_split import Split
from helios.pipeline.denoise import Denoiser, Guidance
from helios.pipeline.entries import PARTS, BothWeights, Entries, short_name
from helios.pipeline.model import Model, sized_model
from helios.precision import precision
from helios.program import Program
from helios.sampler import CounterNoise, build_schedule, pyramid_tokens

BOUND = 1e-5
TOKENS = 7


@functools.cache
def tiny(variant: str, amplified: bool = False, size: str = "tiny") -> Model:
    # Norms over one channel, as the tiny VAE has them, are a sign: a rounding apart, and it is the other one.
    vae = dataclasses.replace(SIZES["tiny"].vae, base_dim=8)
    vae_weights = RandomWeights(vae_shapes(vae), seed=0)
    model = dataclasses.replace(sized_model(size, variant), vae=vae, vae_weights=vae_weights)
    if not amplified:
        return model
    config = dataclasses.replace(model.transformer, is_amplify_history=True)
    weights = RandomWeights(transformer_shapes(config), seed=3)
    return dataclasses.replace(model, transformer=config, transformer_weights=weights)


def entries(model: Model, **options: Any) -> Entries:
    return Entries(
        model, **{"height": 64, "width": 128, "text_tokens": TOKENS, "precision": precision("fp32")} | options
    )


def about(asked: Entries) -> About:
    model = {"name": "tiny", "variant": asked.model.variant.name, "identity": "0" * 16, "random_weights": True}
    sizes = {"height": asked.height, "width": asked.width, "batch": asked.batch, "text_tokens": asked.text_tokens}
    return About(model, asked.precision.name, sizes, {}, asked.programs())


def written(asked: Entries, folder: Path, options: Options | None = None) -> Stranger:
    export(folder, [asked.plan()], BothWeights(asked.model), about(asked), options)
    return Stranger(folder)


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(came: Any, wanted: Tensor) -> float:
    """Relative, of all elements together."""
    exact = wanted.double()
    return float((torch.from_numpy(np.asarray(came)).double() - exact).norm() / exact.norm())


def inputs_of(asked: Entries, program: Program, rate: Rate) -> dict[str, Tensor]:
    """Random inputs of one slower rate."""
    found = {v.name: v for graph in program.plan.graphs.values() for v in graph.inputs_at(rate)}
    wanted = sorted(program.input_names(rate))
    return {name: drawn(found[name].shape, seed) for seed, name in enumerate(wanted, start=10 * rate)}


def reference(asked: Entries) -> Program:
    program = ReferenceBackend().compile(asked.plan())
    program.load(BothWeights(asked.model))
    return program


CASES = [
    pytest.param("tiny", "distilled", False, Options(), id="distilled"),
    pytest.param("tiny", "distilled", True, Options(), id="amplified"),
    pytest.param("tiny", "mid", False, Options("annotated"), id="mid-annotated"),
    pytest.param("tiny", "base", True, Options(opset=18), id="base-18"),
    pytest.param("mini", "distilled", False, Options(), id="mini", marks=pytest.mark.slow),
    pytest.param("mini", "distilled", True, Options(), id="mini-amplified", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "variant", "amplified", "options"), CASES)
def test_every_model_gives_what_the_reference_gives(
    size: str, variant: str, amplified: bool, options: Options, tmp_path: Path
) -> None:
    asked = entries(tiny(variant, amplified, size))
    stranger, program = written(asked, tmp_path / "onnx", options), reference(asked)
    slow = {rate: inputs_of(asked, program, rate) for rate in (Rate.PROMPT, Rate.CHUNK)}
    context = program.bind(slow[Rate.PROMPT]) | program.bind(slow[Rate.CHUNK])
    given = {name: tensor.numpy() for tensors in slow.values() for name, tensor in tensors.items()}
    held: dict[str, dict[str, Any]] = {}
    for often in ("load", "prompt", "chunk"):
        held = stranger.phase(often, held, given)
    for phase in held.values():
        for name, came in phase.items():
            assert error(came, context.values.get(name, program.weights.get(name))) <= BOUND, name
    for entry, graph in program.plan.steps.items():
        step = {v.name: drawn(v.shape, i) for i, v in enumerate(graph.inputs_at(Rate.STEP))}
        wanted = program.run(entry, step, context)
        came = stranger.run(entry, held, {**given, **{name: x.numpy() for name, x in step.items()}})
        assert len(came) == len(wanted)
        for mine, theirs in zip(came.values(), wanted.values(), strict=True):
            assert error(mine, theirs) <= BOUND, entry


class _Draws(CounterNoise):
    """Keeps what it drew, by the names that programs give it."""

    def __init__(self) -> None:
        super().__init__(5)
        self.drawn: dict[str, Any] = {}

    def latents(self, chunk: int, shape: tuple[int, ...]) -> Tensor:
        made = super().latents(chunk, shape)
        self.drawn["noise"] = made.numpy()
        return made

    def block(self, chunk: int, stage: int, shape: tuple[int, ...]) -> Tensor:
        made = super().block(chunk, stage, shape)
        self.drawn[f"noise.{stage}"] = made.numpy()
        return made


def chunk_of(asked: Entries, text: Tensor, negative: Tensor, past: dict[str, Tensor], first: bool) -> Any:
    """Latents by the pipeline's own denoiser on the reference backend, and the draws."""
    model, layout = asked.model, asked.layout
    denoiser = Denoiser(
        model.transformer,
        model.scheduler,
        model.pipeline,
        layout,
        precision=asked.precision,
        backend=ReferenceBackend(),
        weights=BothWeights(model),
    )
    tokens = pyramid_tokens(9, layout.height, layout.width, model.scheduler.stages)
    schedule = build_schedule(model.scheduler, model.variant.steps, tokens, amplify=first)
    scale = model.variant.guidance
    guidance = Guidance(
        denoiser.bind_prompt(text),
        denoiser.bind_prompt(negative) if scale > 1 else None,
        scale,
        model.variant.zero_init,
    )
    noise = _Draws()
    return denoiser.chunk(0, schedule, noise, guidance, denoiser.program.bind(past)), noise.drawn


@pytest.mark.parametrize("variant", ["distilled", "mid", "base"])
def test_a_whole_chunk_by_the_manifest_alone(variant: str, tmp_path: Path) -> None:
    asked = entries(tiny(variant), width=64)
    stranger = written(asked, tmp_path / "onnx")
    texts = {name: drawn((1, TOKENS, 32), i) for i, name in enumerate(("positive", "negative"))}
    frames = {"history_long": 16, "history_mid": 2, "history_short": 2}
    past = {name: drawn((1, 16, count, 8, 8), i) for i, (name, count) in enumerate(frames.items(), start=5)}
    given = {name: tensor.numpy() for name, tensor in past.items()}
    loaded = stranger.phase("chunk", stranger.phase("load", {}, {}), given)
    held = {name: stranger.phase("prompt", loaded, {"text": text.numpy()}) for name, text in texts.items()}
    held[""] = loaded
    wanted, noise = chunk_of(asked, texts["positive"], texts["negative"], past, variant == "distilled")
    name = "first_chunk" if variant == "distilled" else "chunk"
    assert ("first_chunk" in stranger.told["programs"]) == (variant == "distilled")
    came = stranger.program(name, noise, held, given)
    assert error(came, wanted) <= BOUND


@pytest.mark.parametrize("group", [3, 4, 9])
def test_the_vae_by_the_manifest_alone(group: int, tmp_path: Path) -> None:
    """Groups that end evenly, that leave a shorter last one, and all at once."""
    asked = entries(tiny("distilled"), width=64, parts=PARTS[2:], group=group)
    stranger, program = written(asked, tmp_path / "onnx"), reference(asked)
    held = {"": stranger.phase("load", {}, {})}
    runner = VaeRunner(
        asked.model.vae,
        lambda graph, inputs: program.run(short_name(graph.name), inputs),
        dtype=torch.float32,
        split=Split(group),
    )
    latents, video, picture = drawn((1, 16, 9, 8, 8), 1), drawn((1, 3, 33, 64, 64), 2), drawn((1, 3, 1, 64, 64), 3)
    came = stranger.program("decode", {"latents": latents.numpy()}, held, {})
    assert came.shape == (1, 3, 33, 64, 64)
    assert error(came, runner.decode(latents)) <= BOUND
    for name, frames in (("encode_video", video), ("encode_image", picture)):
        came = stranger.program(name, {"video": frames.numpy()}, held, {})
        assert error(came, runner.moments(frames)) <= BOUND


def test_both_forms_give_the_same(tmp_path: Path) -> None:
    """Of everything, VAE included: ONNX Runtime inlines the functions, and what is left are the same nodes."""
    asked = entries(tiny("distilled", True), width=64, parts=PARTS)
    forms = [written(asked, tmp_path / form, Options(form)) for form in ("standard", "annotated")]  # type: ignore[arg-type]
    assert [model["graph_sha256"] for model in forms[0].told["models"]] == [
        model["graph_sha256"] for model in forms[1].told["models"]
    ]
    for name, model in forms[0].models.items():
        random = np.random.default_rng(7)
        given = {told["name"]: random.standard_normal(told["shape"]) for told in model["inputs"]}
        held = dict.fromkeys(("weights", "prompt", "chunk"), given)
        same, other = (form.run(name, held, given) for form in forms)
        for which, came in same.items():
            assert np.array_equal(came, other[which]), (name, which)
