"""In which arithmetic the VAE decodes: what a backend declares, what is asked for, and what a run goes on with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from generate_runs import SIZE, Captured, generate, refused, said
from torch import Tensor

import helios
from helios import backend as backends
from helios.backend import ReferenceBackend, select
from helios.errors import BackendError, InputError
from helios.model.config import VaeConfig
from helios.model.random_weights import RandomWeights
from helios.model.shapes import vae_shapes
from helios.model.vae_precision import choose_vae_precision
from helios.model.vae_split import Split
from helios.pipeline import Pipeline
from helios.pipeline.codec import decoding_of
from helios.pipeline.store import RunFolder, Saved, decode_again

SMALL: dict[str, Any] = {"height": 16, "width": 32, "max_sequence_length": 8, "steps": 1, "seed": 3}


class Declaring(ReferenceBackend):
    """Decodes bfloat16 runs in bfloat16, as the CUDA backend does."""

    vae_precisions: Mapping[str, str] = {"bf16": "bf16", "fp16": "fp16"}


def pipeline(backend: Any = "reference", precision: str = "bf16", vae: str | None = None) -> Pipeline:
    return helios.load(size="tiny", variant="base", backend=backend, precision=precision, vae_precision=vae)


# --- which it is ---


@pytest.mark.parametrize(
    ("backend", "precision", "asked", "came"),
    [
        (ReferenceBackend(), "bf16", None, "fp32"),
        (ReferenceBackend(), "fp32", None, "fp32"),
        (ReferenceBackend(), "fp64", None, "fp64"),
        (ReferenceBackend(), "bf16", "bf16", "bf16"),
        (ReferenceBackend(), "fp64", "fp32", "fp32"),
        (Declaring(), "bf16", None, "bf16"),
        (Declaring(), "fp16", None, "fp16"),
        (Declaring(), "fp32", None, "fp32"),
        (Declaring(), "bf16", "fp32", "fp32"),
        (Declaring(), "fp32", "bf16", "bf16"),
    ],
)
def test_the_choice(backend: ReferenceBackend, precision: str, asked: str | None, came: str) -> None:
    assert choose_vae_precision(asked, precision, backend) == came


@pytest.mark.parametrize("name", ["fp8", "bf61", "float32", ""])
def test_another_name_is_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(InputError, match="VAE precision of backend 'cpu'") as told:
        pipeline("cpu", vae=name)
    if name == "bf61":
        assert "did you mean 'bf16'? Known: bf16, fp32" in told.value.why


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "fp8-weights"])
def test_float64_decodes_behind_the_oracle_alone(precision: str) -> None:
    assert "fp64" in ReferenceBackend.precisions
    with pytest.raises(InputError, match="VAE precision of backend 'reference' 'fp64'") as told:
        choose_vae_precision("fp64", precision, ReferenceBackend())
    assert "Known: bf16, fp16, fp32" in told.value.why
    assert told.value.fix == "--vae-precision fp32"
    assert choose_vae_precision("fp64", "fp64", ReferenceBackend()) == "fp64"


def test_a_backend_that_declares_nonsense_is_told() -> None:
    class Odd(ReferenceBackend):
        vae_precisions: Mapping[str, str] = {"bf16": "fp8"}

    with pytest.raises(BackendError, match="decodes in 'fp8'"):
        pipeline(Odd())


def test_what_the_backends_declare() -> None:
    """Half precision runs decode in half precision on CUDA, in its interpreter too; the others as published."""
    cuda = backends.load("cuda").vae_precisions
    assert cuda["bf16"] == cuda["fp8"] == cuda["fp8-attention"] == cuda["fp8-weights"] == "bf16"
    assert cuda["fp16"] == "fp16"
    assert "fp32" not in cuda
    assert not backends.load("cpu").vae_precisions
    assert not ReferenceBackend.vae_precisions


# --- what a pipeline does with it ---


class Watched(Declaring):
    """Keeps the dtypes that convolutions come in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()
        right = self.kernels

        def conv3d(x: Tensor, *rest: Any, **attrs: Any) -> Tensor:
            self.seen.add(x.dtype)
            return right["conv3d"].run(x, *rest, **attrs)  # type: ignore[no-any-return]

        self.__dict__["kernels"] = {**right, "conv3d": dataclasses.replace(right["conv3d"], run=conv3d)}


def test_frames_are_decoded_in_it_and_pictures_encoded_in_float32() -> None:
    backend = Watched()
    made = pipeline(backend)
    list(made.stream("a cat", chunks=1, **SMALL))
    assert backend.seen == {torch.bfloat16}
    backend.seen.clear()
    state = made.begin(made.request("a cat", image=torch.rand(16, 32, 3), chunks=1, **SMALL))
    assert backend.seen == {torch.float32}
    assert state.history.dtype == torch.float32


def test_latents_do_not_depend_on_it_and_frames_differ_by_little() -> None:
    """Eight channels: of the three of size tiny, some positions are near zero, and norms blow their roundings up."""
    vae = VaeConfig(base_dim=8, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
    model = dataclasses.replace(pipeline().model, vae=vae, vae_weights=RandomWeights(vae_shapes(vae), seed=0))
    chunks = [
        next(iter(Pipeline(model, ReferenceBackend(), "bf16", vae_precision=name).stream("a cat", chunks=1, **SMALL)))
        for name in ("bf16", "fp32")
    ]
    assert torch.equal(chunks[0].latents, chunks[1].latents)
    off = (chunks[0].frames.int() - chunks[1].frames.int()).abs().float()
    assert 0 < float(off.mean()) < 2  # of 255


def test_the_plan_tells_it_and_a_split_is_chosen_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def chosen(*arguments: Any, dtype: torch.dtype, half: str, **rest: Any) -> Split:
        asked.append((half, dtype))
        return Split(3)

    monkeypatch.setattr("helios.pipeline.codec.choose_split", chosen)
    made = pipeline(Declaring())
    plan = made.plan(made.request("a cat", **SMALL))["vae"]
    assert plan == {"group": 3, "precision": "bf16"}
    made.codec.choose(1, 9, 16, 32, "encode")
    assert asked == [("decode", torch.bfloat16), ("encode", torch.float32)]
    assert decoding_of(plan, "bf16") == torch.bfloat16
    assert decoding_of({"group": 9}, "bf16") == torch.float32  # of a run from before there was a choice
    assert decoding_of({"group": 9}, "fp64") == torch.float64


def test_a_state_is_continued_in_what_it_says() -> None:
    whole = list(pipeline(vae="fp32").stream("a cat", chunks=2, **SMALL))
    follows = pipeline(Declaring())  # by itself in bfloat16
    assert follows.vae_precision == "bf16"
    (rest,) = follows.stream(chunks=2, state=whole[0].state)
    assert torch.equal(rest.frames, whole[1].frames)
    assert rest.state.plan["vae"]["precision"] == "fp32"
    (other,) = pipeline(vae="bf16").stream(chunks=2, state=whole[0].state)  # asked for: it branches off
    assert torch.equal(other.latents, whole[1].latents)
    assert not torch.equal(other.frames, whole[1].frames)
    assert other.state.plan["vae"]["precision"] == "bf16"


def test_runs_in_two_arithmetics_take_turns_in_one_pipeline() -> None:
    narrow, wide = (list(pipeline(Declaring(), vae=vae).stream("a cat", chunks=3, **SMALL)) for vae in (None, "fp32"))
    one = pipeline(Declaring())
    both = [one.stream(chunks=3, state=chunks[0].state) for chunks in (narrow, wide)]
    for k, (a, b) in enumerate(zip(*both, strict=True), 1):
        assert torch.equal(a.frames, narrow[k].frames)
        assert torch.equal(b.frames, wide[k].frames)


def test_a_state_of_an_arithmetic_that_the_backend_lacks_is_refused() -> None:
    state = next(iter(pipeline(vae="bf16").stream("a cat", chunks=1, **SMALL))).state
    told = dataclasses.replace(state, plan={**state.plan, "vae": {"group": 9, "precision": "fp16"}})
    with pytest.raises(InputError, match="unknown VAE precision of backend 'cpu' 'fp16'"):
        next(iter(pipeline("cpu").stream(chunks=2, state=told)))


def test_a_chunk_is_decoded_again_in_what_it_was(tmp_path: Path) -> None:
    for vae in ("bf16", "fp32"):
        chunk = next(iter(pipeline(vae=vae).stream("a cat", chunks=1, **SMALL)))
        again = decode_again(pipeline(Declaring()).codec, Saved(chunk.state, chunk.latents, ""))
        assert torch.equal(again, chunk.frames)


# --- the command line ---


def test_generate_shows_it_and_goes_on_with_it(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "boat.mp4"
    asked = ["--out", out, "--backend", "cpu"]
    size = [word for word in SIZE if word != "fp32"]
    size[size.index("--precision") + 1 : size.index("--precision") + 1] = ["bf16"]
    assert generate("a boat", *size, "--vae-precision", "bf16", "--chunks", 1, *asked) == 0
    assert "on cpu in bf16, VAE in bf16" in said(capsys)
    assert RunFolder.open(RunFolder.beside(out)).about["execution"]["vae_precision"] == "bf16"
    error = refused(capsys, "--resume", "--chunks", 2, "--vae-precision", "fp32", *asked)
    assert "vae: {'group': 9, 'precision': 'bf16'} was saved, {'group': 9, 'precision': 'fp32'} is asked for" in error
    assert generate("--resume", "--chunks", 2, *asked) == 0
    assert "VAE in bf16" in said(capsys)
    assert RunFolder.open(RunFolder.beside(out)).read(1).state.plan["vae"]["precision"] == "bf16"
    branch = tmp_path / "branch.mp4"
    words = ["--from-chunk", 1, "--run", out, "--out", branch, "--vae-precision", "fp32"]
    assert generate(*words) == 0
    assert "VAE in" not in said(capsys)
    assert RunFolder.open(RunFolder.beside(branch)).read(1).state.plan["vae"]["precision"] == "fp32"


def test_a_run_from_before_there_was_a_choice_goes_on_as_published(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.open(RunFolder.beside(copied))
    execution = {k: v for k, v in folder.about["execution"].items() if k != "vae_precision"}
    folder.note({"execution": execution})
    monkeypatch.setattr(type(select("cpu")), "vae_precisions", {"fp32": "bf16"})
    assert generate("--resume", "--chunks", 4, "--out", copied) == 0
    assert RunFolder.open(RunFolder.beside(copied)).read(3).state.plan["vae"]["precision"] == "fp32"


def test_a_wrong_name_is_one_line(tmp_path: Path, capsys: Captured) -> None:
    error = refused(capsys, "a", *SIZE, "--vae-precision", "fp23", "--out", tmp_path / "boat.mp4")
    assert "unknown VAE precision of backend 'cpu' 'fp23': did you mean 'fp32'? Known: bf16, fp32" in error
