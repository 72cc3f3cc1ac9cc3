"""The chunk loop: determinism, what is computed how often, states, prompts that change, and what does not grow."""

from __future__ import annotations

import dataclasses
import functools
import json
import queue
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import helios
from helios.backend import ReferenceBackend
from helios.errors import InputError, StateError
from helios.graph import Rate
from helios.model.vae_split import Split
from helios.pipeline import Chunk, Pipeline, Progress, RunState
from helios.pipeline.codec import plan_of, split_of
from helios.pipeline.history import Window
from helios.pipeline.prompts import PromptState, script_of

SMALL: dict[str, Any] = {"height": 64, "width": 64, "max_sequence_length": 8, "steps": 1, "seed": 3}
BASE: dict[str, Any] = {**SMALL, "height": 16, "width": 32, "steps": 2}


@functools.cache
def tiny(variant: str = "distilled") -> Pipeline:
    return helios.load(size="tiny", variant=variant, backend="reference")


def same(a: Any, b: Any) -> bool:
    """Bit for bit, latents and frames."""
    return torch.equal(a.latents, b.latents) and torch.equal(a.frames, b.frames)


def all_same(a: list[Chunk], b: list[Chunk]) -> bool:
    return len(a) == len(b) and all(x.index == y.index and same(x, y) for x, y in zip(a, b, strict=True))


# --- shapes and lengths ---


def test_chunks_and_result_have_the_stated_shapes() -> None:
    pipeline = tiny("base")
    chunks = list(pipeline.stream("a cat", frames=40, **BASE))
    assert [chunk.index for chunk in chunks] == [0, 1]
    for chunk in chunks:
        assert (tuple(chunk.latents.shape), chunk.latents.dtype) == ((1, 16, 9, 2, 4), torch.float32)
        assert (tuple(chunk.frames.shape), chunk.frames.dtype) == ((1, 33, 16, 32, 3), torch.uint8)
        assert set(chunk.timings) == {"text", "history", "denoise", "decode", "total"}
        assert chunk.timings["total"] == pytest.approx(sum(v for k, v in chunk.timings.items() if k != "total"))
    result = pipeline.generate("a cat", frames=40, **BASE)
    assert result.frames.shape == (1, 65, 16, 32, 3)
    assert (result.asked, result.returned) == ("40 frames", "65 frames (2 chunks, 2.71 s)")
    assert torch.equal(result.latents, torch.cat([chunk.latents for chunk in chunks], 2))
    assert torch.equal(result.frames, torch.cat([chunk.frames for chunk in chunks], 1)[:, :65])
    assert result.random_weights
    assert len(result.timings) == 2


@pytest.mark.parametrize(("length", "chunks"), [({"frames": 1}, 1), ({"frames": 33}, 1), ({"frames": 34}, 2),
                                               ({"seconds": 1.375}, 1), ({"seconds": 1.4}, 2), ({"chunks": 44}, 44),
                                               ({}, 8)])  # fmt: skip
def test_lengths(length: dict[str, Any], chunks: int) -> None:
    assert tiny().request("a cat", **SMALL, **length).chunks == chunks


def test_progress_is_told_after_every_step() -> None:
    told: list[Progress] = []
    settings = SMALL | {"steps": (1, 2, 1)}
    list(tiny().stream("a cat", chunks=2, progress=told.append, **settings))
    assert [(p.chunk, p.stage, p.step, p.steps, p.chunks) for p in told] == [
        *((0, stage, step, 8, 2) for stage, step in [(0, 1), (0, 2), (1, 3), (1, 4), (1, 5), (1, 6), (2, 7), (2, 8)]),
        *((1, stage, step, 4, 2) for stage, step in [(0, 1), (1, 2), (1, 3), (2, 4)]),
    ]
    assert all(p.seconds > 0 for p in told)


@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_the_whole_pipeline_runs_without_arithmetic(variant: str) -> None:
    pipeline = helios.load(size="tiny", variant=variant, backend="reference:meta")
    image = torch.zeros(64, 64, 3)
    result = pipeline.generate("a cat", chunks=2, image=image, **SMALL)
    assert result.frames.shape == (1, 65, 64, 64, 3)


def test_float64() -> None:
    settings: dict[str, Any] = BASE | {"chunks": 2}
    exact = helios.load(size="tiny", variant="base", backend="reference", precision="fp64").generate("a", **settings)
    single = tiny("base").generate("a", **settings)
    assert exact.latents.dtype == torch.float64
    error = float((single.latents - exact.latents).norm() / exact.latents.norm())
    assert 0 < error < 1e-5


def test_a_backend_that_packs_views_of_weights() -> None:
    """The VAE's attention multiplies with a reshaped convolution weight; the cpu backend packs what products take."""
    packed = helios.load(size="tiny", variant="distilled", backend="cpu", precision="fp32")
    image = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0))
    ours, plain = (p.generate("a cat", chunks=2, image=image, **SMALL) for p in (packed, tiny()))
    assert float((ours.latents - plain.latents).norm() / plain.latents.norm()) < 1e-5
    assert (ours.frames == plain.frames).float().mean() > 0.99


# --- the same bits ---


@pytest.mark.parametrize(("variant", "rng"), [("mid", "helios"), ("distilled", "diffusers")])
def test_any_split_gives_the_same_bits(variant: str, rng: Any) -> None:
    settings: dict[str, Any] = SMALL | {"rng": rng, "image": torch.rand(64, 64, 3)}
    whole = list(tiny(variant).stream("a cat", chunks=3, **settings))
    assert all_same(whole, list(tiny(variant).stream("a cat", chunks=3, **settings)))
    assert not same(whole[0], next(iter(tiny(variant).stream("a cat", chunks=1, **(settings | {"seed": 4})))))
    fresh = helios.load(size="tiny", variant=variant, backend="reference")
    for cut in (1, 2):
        first = list(fresh.stream("a cat", chunks=cut, **settings))
        rest = list(fresh.stream("a cat", chunks=3, state=first[-1].state, **settings))
        assert all_same(whole, first + rest)
        alone = list(tiny(variant).stream(chunks=3, state=whole[cut - 1].state))  # all settings from the state
        assert all_same(whole[cut:], alone)


def test_a_prompt_leaves_nothing_behind() -> None:
    pipeline = tiny("mid")
    first, other, again = (pipeline.generate(text, chunks=1, **SMALL) for text in ("a cat", "a red boat", "a cat"))
    assert same(first, again)
    assert not same(first, other)


def test_stepping_two_runs_in_turns_mixes_nothing() -> None:
    alone = [list(tiny("mid").stream(text, chunks=2, **SMALL)) for text in ("a cat", "a red boat")]
    both = [tiny("mid").stream(text, chunks=2, **SMALL) for text in ("a cat", "a red boat")]
    turns = list(zip(*both, strict=True))
    assert all(same(turns[i][j], alone[j][i]) for i in (0, 1) for j in (0, 1))


def test_a_state_survives_a_file(tmp_path: Path) -> None:
    chunks = list(tiny().stream("a cat", chunks=3, rng="diffusers", **SMALL))
    tensors, metadata = chunks[0].state.to_tensors()
    save_file(tensors, tmp_path / "state.safetensors", metadata=metadata)
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        read = RunState.from_tensors({name: file.get_tensor(name) for name in file.keys()}, file.metadata())  # noqa: SIM118
    assert all_same(chunks[1:], list(tiny().stream(chunks=3, state=read)))
    request = tiny().request("a cat", rng="diffusers", **SMALL)
    assert read.differences(request.settings(), tiny().plan(request, read)) == []
    changed = tiny().request("a cat", rng="diffusers", **(SMALL | {"seed": 4, "steps": 2}))
    assert read.differences(changed.settings()) == [
        "seed: 3 was saved, 4 is asked for",
        "steps: [1, 1, 1] was saved, [2, 2, 2] is asked for",
    ]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "9"}, "format 9"),
        ({"chunk": "x"}, "damaged"),
        ({"prompt": "{}"}, "damaged"),
        ({"plan": ""}, "damaged"),
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, str], match: str) -> None:
    tensors, metadata = next(iter(tiny().stream("a cat", chunks=1, **SMALL))).state.to_tensors()
    with pytest.raises(StateError, match=match):
        RunState.from_tensors(tensors, metadata | change)
    with pytest.raises(StateError, match="damaged"):
        RunState.from_tensors({}, metadata)


def test_a_state_of_another_size_or_generator_is_refused() -> None:
    state = next(iter(tiny().stream("a cat", chunks=1, **SMALL))).state
    with pytest.raises(StateError, match="history is"):
        next(iter(tiny().stream(chunks=2, state=state, height=128)))
    with pytest.raises(StateError, match="random state"):
        next(iter(tiny().stream(chunks=2, state=state, rng="diffusers")))


def test_the_way_to_decode_is_kept_in_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(iter(tiny().stream("a cat", chunks=1, **SMALL)))
    assert first.state.plan["vae"] == {"group": 9, "precision": "fp32"}
    monkeypatch.setattr(type(tiny().codec), "choose", lambda self, *a, **k: Split(2))
    request = tiny().request("a cat", **SMALL)
    assert tiny().plan(request)["vae"] == {"group": 2, "precision": "fp32"}
    assert tiny().plan(request, first.state)["vae"] == {"group": 9, "precision": "fp32"}
    for split in (Split(3), Split(1, helios.model.vae_split.Tile(64, 48))):
        assert split_of(plan_of(split)) == split


def test_what_the_backend_chose_is_kept_in_the_state_and_chosen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend of each pipeline measures something else, and knows it once its programs are compiled."""
    compile_plan = ReferenceBackend.compile

    def choosing(self: Any, plan: Any, **rest: Any) -> Any:
        vars(self).setdefault("chosen", {})[plan.digest[:4]] = vars(self).get("told", {}).get(plan.digest[:4], id(self))
        return compile_plan(self, plan, **rest)

    monkeypatch.setattr(ReferenceBackend, "compile", choosing)
    monkeypatch.setattr(ReferenceBackend, "execution_plan", lambda self: dict(vars(self).get("chosen", {})))
    monkeypatch.setattr(ReferenceBackend, "use_execution_plan", lambda self, plan: setattr(self, "told", dict(plan)))
    first, other = (helios.load(size="tiny", variant="distilled", backend="reference") for _ in range(2))
    state = next(iter(first.stream("a cat", chunks=1, **SMALL))).state
    chosen = state.plan["execution"]
    assert len(chosen) == 2  # of the transformer, and of the autoencoder, which is compiled in the first chunk
    assert set(chosen.values()) == {id(first.backend)}
    later = next(iter(other.stream(chunks=2, state=state))).state
    assert later.plan["execution"] == chosen
    json.dumps(chosen)


# --- what is computed how often ---


def test_a_base_run_of_50_guided_steps_computes_the_text_twice() -> None:
    pipeline = helios.load(size="tiny", variant="base", backend="reference")
    list(pipeline.stream("a cat", chunks=2, **(BASE | {"steps": 50})))
    assert pipeline.evaluations == {Rate.WEIGHTS: 1, Rate.PROMPT: 2, Rate.CHUNK: 2}
    list(pipeline.stream("a dog", chunks=1, negative_prompt="dark", **BASE))
    assert pipeline.evaluations == {Rate.WEIGHTS: 1, Rate.PROMPT: 4, Rate.CHUNK: 3}
    list(pipeline.stream("a dog", chunks=1, **(BASE | {"guidance": 1.0})))
    assert pipeline.evaluations == {Rate.WEIGHTS: 1, Rate.PROMPT: 5, Rate.CHUNK: 4}


def test_a_state_does_not_grow_with_the_video() -> None:
    sizes = [sum(t.untyped_storage().nbytes() for t in c.state.to_tensors()[0].values())
             for c in tiny("base").stream("a cat", chunks=6, **(BASE | {"steps": 1}))]  # fmt: skip
    assert len(set(sizes)) == 1


def test_tensors_alive_do_not_grow_with_the_video() -> None:
    import gc

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    counts = []
    for _ in tiny("base").stream("a cat", chunks=12, **(BASE | {"steps": 1})):
        counts.append(alive())
    assert counts[2:] == [counts[2]] * 10


# --- prompts that change ---


def test_weights_of_a_new_prompt() -> None:
    state = PromptState(("a",)).change(("b",), 7)
    assert [state.weight(chunk, 3) for chunk in (7, 8, 9, 20)] == [0.0, 0.5, 1.0, 1.0]
    assert [state.weight(7, steps) for steps in (0, 1, 2)] == [1.0, 0.0, 0.0]
    assert state.change(("b",), 9) is state
    assert PromptState(("a",)).weight(0, 3) == 1.0


def test_a_schedule_changes_the_prompt_gradually() -> None:
    settings: dict[str, Any] = BASE | {"guidance": 1.0}
    pipeline = tiny("base")
    chunks = list(pipeline.stream(prompts=[("a cat", 2), ("a red boat", 4)], **settings))
    plain = list(pipeline.stream("a cat", chunks=6, **settings))
    assert len(chunks) == 6
    # the first chunk of the new prompt still has all of the old one
    assert [same(a, b) for a, b in zip(chunks, plain, strict=True)] == [True] * 3 + [False] * 3
    assert [c.state.prompt.current for c in chunks] == [("a cat",)] * 2 + [("a red boat",)] * 4
    # halfway between the two in chunk 3, and all of the new one from chunk 4 on
    cut = list(pipeline.stream("a red boat", chunks=6, state=chunks[3].state, **settings))
    assert all_same(cut, chunks[4:])
    old, new = (pipeline.text.encode(text, 8).embedding for text in ("a cat", "a red boat"))
    embeds = torch.lerp(old, new, 0.5)[None]
    middle = next(iter(pipeline.stream(prompt_embeds=embeds, chunks=4, state=chunks[2].state, **settings)))
    assert same(middle, chunks[3])


def test_a_schedule_continues_in_the_middle_of_a_change() -> None:
    script: Any = [("a cat", 1), ("a red boat", 3), ("a dog", 2)]
    whole = list(tiny("base").stream(prompts=script, **BASE))
    for cut in range(1, 6):
        rest = tiny("base").stream(prompts=script, state=whole[cut - 1].state, **BASE)
        assert all_same(list(rest), whole[cut:])


def test_prompts_that_arrive_while_it_runs() -> None:
    waiting: queue.Queue[str] = queue.Queue()
    stream = tiny("base").stream("a cat", prompts=waiting, interpolation_steps=0, **BASE)
    got = [next(stream), next(stream)]
    waiting.put("a dog")
    waiting.put("a red boat")
    got += [next(stream), next(stream)]  # the newest counts, and the video has no end
    asked: list[int] = []

    def ask(chunk: int) -> str | None:
        asked.append(chunk)
        return "a red boat" if chunk == 2 else None

    by_function = tiny("base").stream("a cat", prompts=ask, interpolation_steps=0, chunks=4, **BASE)
    assert all_same(got, list(by_function))
    assert asked == [0, 1, 2, 3]
    assert [c.state.prompt.since for c in got] == [0, 0, 2, 2]
    with pytest.raises(InputError, match="generate needs an end"):
        tiny("base").generate("a cat", prompts=waiting, **BASE)


def test_rewind_and_branch() -> None:
    whole = list(tiny("base").stream("a cat", chunks=4, **BASE))
    branch = list(tiny("base").stream("a red boat", chunks=4, state=whole[1].state))
    assert [chunk.index for chunk in branch] == [2, 3]
    assert not same(branch[0], whole[2])
    assert branch[0].state.prompt == PromptState(("a red boat",), ("a cat",), 2)
    gradual = tiny("base").stream("a red boat", chunks=4, state=whole[1].state, interpolation_steps=3)
    assert same(next(iter(gradual)), whole[2])
    reseeded = list(tiny("base").stream(chunks=3, state=whole[1].state, seed=9))
    assert not same(reseeded[0], whole[2])
    assert all_same(list(tiny("base").stream(chunks=4, state=whole[1].state)), whole[2:])
    assert list(tiny("base").stream(chunks=4, state=whole[3].state)) == []
    with pytest.raises(InputError, match="nothing is left"):
        tiny("base").generate(chunks=4, state=whole[3].state)


def test_a_script_must_make_sense() -> None:
    for wrong in ("a cat", [], [("a cat", 0)], [""], 5):
        with pytest.raises(InputError):
            script_of(wrong)
    assert script_of(["a", "b"], 2).chunks == 4
    assert [script_of(["a", "b"], 2).wanted(chunk) for chunk in range(6)] == ["a", "a", "b", "b", "b", "b"]


# --- history ---


@pytest.mark.parametrize("keep", [True, False])
def test_the_window_is_the_newest_frames(keep: bool) -> None:
    window = Window(keep_first_frame=keep)
    frames = torch.arange(40.0).view(1, 1, 40, 1, 1)
    history = window.extend(window.extend(window.start(frames, 1), frames[:, :, :9]), frames[:, :, 9:30])
    inputs = window.inputs(history, torch.full((1, 1, 1, 1, 1), -1.0))
    groups = [inputs[f"history_{name}"].flatten().tolist() for name in ("long", "mid", "short")]
    assert groups[1:] == ([[27, 28], [-1, 29]] if keep else [[26, 27], [28, 29]])
    assert groups[0] == list(range(11, 27) if keep else range(10, 26))
    short = window.inputs(history, None)["history_short"].flatten().tolist()
    assert short == ([0, 29] if keep else [28, 29])


def test_the_anchor_is_the_first_frame_or_the_image() -> None:
    chunks = list(tiny("base").stream("a cat", chunks=3, **BASE))
    assert all(torch.equal(c.state.anchor, chunks[0].latents[:, :, :1]) for c in chunks)  # type: ignore[arg-type]
    skipped = list(tiny("base").stream("a cat", chunks=3, skip_first_chunk=True, **BASE))
    assert torch.equal(skipped[2].state.anchor, skipped[1].latents[:, :, :1])  # type: ignore[arg-type]
    free = list(tiny("base").stream("a cat", chunks=2, keep_first_frame=False, **BASE))
    assert free[1].state.anchor is None
    pipeline = tiny("base")
    start = pipeline.begin(pipeline.request("a cat", image=torch.rand(16, 32, 3), **BASE))
    after = next(iter(pipeline.stream("a cat", chunks=1, image=torch.rand(16, 32, 3), state=start, **BASE)))
    assert start.anchor is not None
    assert torch.equal(after.state.anchor, start.anchor)  # type: ignore[arg-type]
    assert not start.history[:, :, :-1].any()
    assert start.history[:, :, -1:].any()


def test_only_the_video_that_is_seen_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny("base")
    sections: list[int] = []
    original = type(pipeline.codec).encode

    def count(self: Any, video: torch.Tensor, *rest: Any) -> torch.Tensor:
        sections.append(video.shape[2])
        return original(self, video, *rest)

    monkeypatch.setattr(type(pipeline.codec), "encode", count)
    video = torch.rand(33 * 5 + 7, 16, 32, 3)
    start = pipeline.begin(pipeline.request("a cat", video=video, **BASE))
    assert sections == [1, 33, 33, 33]
    assert start.history.all()
    again = pipeline.begin(pipeline.request("a cat", video=video, rng="diffusers", **BASE))
    assert sections[4:] == [1, 33, 33, 33, 33, 33]
    assert again.history.shape == start.history.shape == (1, 16, 19, 2, 4)


def test_states_are_never_changed() -> None:
    state = next(iter(tiny("base").stream("a cat", chunks=1, **BASE))).state
    before = {name: tensor.clone() for name, tensor in state.to_tensors()[0].items()}
    list(tiny("base").stream("a cat", chunks=3, state=state, **BASE))
    assert all(torch.equal(before[name], tensor) for name, tensor in state.to_tensors()[0].items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.chunk = 5  # type: ignore[misc]
