"""A whole video through engines of the recorder: transformer, solver, stages and VAE. Not run on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trt_acts
from trt_networks import error, tiny
from trt_rig import RecordedTrt, recorded

from helios.backend import ReferenceBackend
from helios.errors import BackendError, InputError
from helios.pipeline import Pipeline

SETTINGS: dict[str, Any] = {"height": 64, "width": 64, "chunks": 3, "seed": 7}
BOUND = 2e-5


@pytest.fixture(scope="module")
def truth() -> Any:
    return Pipeline(tiny(), ReferenceBackend(), "fp32").generate("a lighthouse", **SETTINGS)


@pytest.mark.parametrize(("major", "weights"), [(10, "profiles"), (11, "inputs")])
def test_three_chunks_are_those_of_the_reference(truth: Any, major: int, weights: str) -> None:
    with recorded(major):
        found = Pipeline(tiny(), RecordedTrt(weights=weights), "fp32").generate("a lighthouse", **SETTINGS)
    assert error(found.latents, truth.latents) < BOUND
    assert found.frames.shape == truth.frames.shape
    assert int((found.frames.int() - truth.frames.int()).abs().max()) <= 1
    execution = found.state.plan["execution"]
    assert {name.rpartition("-")[0] for name in execution["engines"]} >= {"prompt", "chunk", "denoise.0", "shrink"}


def test_resumed_run_goes_on_with_its_engines(truth: Any) -> None:
    with recorded(11):
        first = Pipeline(tiny(), RecordedTrt(), "fp32").generate("a lighthouse", **SETTINGS | {"chunks": 1})
        rest = Pipeline(tiny(), RecordedTrt(), "fp32").generate(state=first.state, chunks=3)
    assert error(torch.cat([first.latents, rest.latents], 2), truth.latents) < BOUND


def test_resumed_run_refuses_another_tensorrt_and_another_engine() -> None:
    with recorded(11):
        first = Pipeline(tiny(), RecordedTrt(), "fp32").generate("a lighthouse", **SETTINGS | {"chunks": 1})
        engines = first.state.plan["execution"]["engines"]
        name = next(name for name in engines if name.startswith("denoise.0"))
        kept, engines[name] = engines[name], "0" * 64
        with pytest.raises(InputError, match=r"another engine of denoise\.0"):
            Pipeline(tiny(), RecordedTrt(), "fp32").generate(state=first.state, chunks=2)
        engines[name] = kept
    with recorded(10), pytest.raises(BackendError, match=r"made with TensorRT 11\.4\.0\.106, this is 10\.16\.1\.11"):
        Pipeline(tiny(), RecordedTrt(), "fp32").generate(state=first.state, chunks=2)


def test_picture_and_guidance_pass_through_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding, the unconditional branch and its guidance: built and run, in bfloat16 as far as types go."""
    monkeypatch.setenv(trt_acts.ZEROS, "1")
    picture = torch.zeros(64, 64, 3, dtype=torch.uint8)
    with recorded(11) as strict:
        pipeline = Pipeline(tiny(), RecordedTrt(), "bf16")
        assert pipeline.vae_precision == "bf16"
        settings = {"height": 64, "width": 64, "chunks": 1, "guidance": 3.0}
        found = pipeline.generate("a lighthouse", image=picture, **settings)
    assert found.frames.shape == (1, 33, 64, 64, 3)
    names = {name.rpartition("-")[0] for name in pipeline.backend.execution_plan()["engines"]}
    assert any(name.startswith("vae_encode") for name in names)
    assert "Builder.build_serialized_network" in [call for call, _ in strict.calls]
