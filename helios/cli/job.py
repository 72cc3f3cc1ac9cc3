"""What ``helios generate`` is about to do: begin a run, go on with one, or branch off from one. Checks first."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helios.cli import output
from helios.errors import InputError, StateError

if TYPE_CHECKING:
    from helios.pipeline import Pipeline, Request, RunState
    from helios.pipeline.store import Finished, RunFolder

__all__ = ["Asked", "Job", "prepare", "read_prompts", "resume_command"]

_MODEL = ("model", "size", "variant")
_NOT_KEPT = ("kind", "given", "embeds", "negative_embeds", "latents", "interpolation_steps")
"""Settings that a request makes of its frames, tensors and prompts."""


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """The options of the command; what was not given is None, or absent from a mapping.

    Attributes:
        prompt: one text for the whole video.
        schedule: or texts with their numbers of chunks.
        model: of ``model``, ``size`` and ``variant`` what was given.
        settings: of ``helios.pipeline.Settings`` what was given, without prompts and length.
        length: of ``chunks``, ``frames`` and ``seconds`` what was given.
        out: the video.
        from_chunk: branch off there.
        run: the video, or its folder, to branch off from; otherwise the one of ``out``.
    """

    prompt: str | None
    schedule: tuple[str | tuple[str, int], ...] | None
    model: Mapping[str, str]
    settings: Mapping[str, Any]
    length: Mapping[str, Any]
    out: Path
    backend: str | None = None
    precision: str | None = None
    fallback: str | None = None
    resume: bool = False
    overwrite: bool = False
    from_chunk: int | None = None
    run: Path | None = None
    backend_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    vae_precision: str | None = None


@dataclasses.dataclass(slots=True)
class Job:
    """Checked, and ready to start: nothing on the disk has been touched.

    Attributes:
        out: the video to write.
        path: of its run folder.
        about: what ``run.json`` is to say.
        state: to go on from; None for the beginning.
        done: finished chunks that stay as they are.
        origin: run and number of chunks to copy from it, for a branch.
        folder: of a run that goes on; a new one is made by ``begin``.
        notes: what the user should know before it starts.
    """

    pipeline: Pipeline
    request: Request
    out: Path
    path: Path
    about: Mapping[str, Any]
    state: RunState | None = None
    done: int = 0
    origin: tuple[RunFolder, int] | None = None
    folder: RunFolder | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def chunks(self) -> int:
        """Chunks of the whole video."""
        assert self.request.chunks is not None  # the command line has no source of prompts without end
        return self.request.chunks

    def begin(self) -> RunFolder:
        """The run folder, made if it is new; call it under its lock."""
        from helios.pipeline.store import RunFolder

        if self.folder is None:
            self.folder = RunFolder.create(self.path, self.about, self.origin)
        elif dict(self.about) != dict(self.folder.about):
            self.folder = RunFolder(self.path, self.about)
            self.folder.note({})
        return self.folder


def prepare(asked: Asked) -> Job:
    """Check everything and load what is needed.

    Raises:
        HeliosError: what is wrong; nothing has been written then.
    """
    from helios.media import check_output
    from helios.pipeline.store import RunFolder

    check_output(asked.out)
    path = RunFolder.beside(asked.out)
    if asked.from_chunk is not None:
        return _branch(asked)
    if asked.run is not None:
        raise InputError("--run names a run to branch off from, but not where", "add --from-chunk K")
    if asked.resume and ((path / "run.json").is_file() or asked.out.exists()):
        return _go_on(asked, path)
    _refuse_existing(asked, path)
    job = _new(asked, path)
    if asked.resume:
        job.notes.append(f"there is no run in {path} yet: this one starts from the beginning")
    return job


def read_prompts(path: Path) -> tuple[str | tuple[str, int], ...]:
    """A schedule from a text file: a prompt a line, with ``| N`` behind it if it is for N chunks.

    Empty lines and lines that begin with ``#`` are passed over.

    Raises:
        InputError: no such file, not UTF-8 text, no prompt in it, or a prompt for 0 chunks.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"--prompts {path} cannot be read: {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts {path} is not UTF-8 text", "save it as UTF-8, a prompt a line") from error
    parts = [_part(line, f"--prompts {path}, line {number}") for number, line in enumerate(text.splitlines(), 1)]
    found = tuple(part for part in parts if part is not None)
    if not found:
        raise InputError(f"--prompts {path} holds no prompt", "write a prompt a line; `a prompt | 3` is for 3 chunks")
    return found


def resume_command(out: Path) -> list[str]:
    """The command that goes on with the run of a video."""
    return ["helios", "generate", "--resume", "--out", str(out)]


def _part(line: str, where: str) -> str | tuple[str, int] | None:
    line = line.strip()
    if not line or line.startswith("#"):
        return None
    text, bar, count = line.rpartition("|")
    if not bar or not count.strip().isdecimal():
        return line
    if not int(count) or not text.strip():
        raise InputError(f"{where}: {line!r} wants a prompt and at least 1 chunk", "write it as `a prompt | 3`")
    return text.strip(), int(count)


# --- three ways to start ---


def _new(asked: Asked, path: Path) -> Job:
    _require_model(asked)
    pipeline = _load(asked, {})
    request = _request(pipeline, asked, {})
    job = Job(pipeline, request, asked.out, path, _about(asked, pipeline, request, {}))
    return _checked(job)


def _go_on(asked: Asked, path: Path) -> Job:
    from helios.pipeline.store import RunFolder

    if asked.overwrite:
        raise InputError("--resume goes on with a run, --overwrite starts it again", "give one of them")
    folder = RunFolder.open(path)
    about, finished, first = folder.about, folder.finished(), int(folder.about["first"])
    pipeline = _load(asked, about)
    state = folder.read(finished.count - 1).state if finished.count else None
    if state is not None and finished.count > first:
        _refuse([_model_difference(state, pipeline, asked, about)], path, finished)
    elif first and finished.count < first:
        raise StateError(f"{path}: {finished.problem or 'its first chunks are missing'}", "branch off again")
    request = _request(pipeline, asked, about, started=state is not None)
    if state is not None and finished.count > first:
        _refuse(_differences(asked, request, state, finished, first), path, finished)
    about = _renewed(_about(asked, pipeline, request, about), folder, finished)
    job = Job(pipeline, request, asked.out, path, about, state, finished.count, folder=folder)
    if finished.problem:
        again = f"chunk {finished.count} and those after it are made again"
        whole = "nothing before it" if not finished.count else f"{output.count(finished.count, 'chunk')} before it kept"
        job.notes.append(f"{finished.problem}; {whole}, {again}")
    if finished.count < job.chunks and state is not None and finished.count > first:
        plan = pipeline.plan(request, state)
        _refuse(state.differences(state.settings, plan), path, finished)
    return _checked(job)


def _branch(asked: Asked) -> Job:
    from helios.pipeline.store import RunFolder

    count = asked.from_chunk or 0
    if asked.resume:
        raise InputError("--from-chunk makes a new run, --resume goes on with one", "give one of them")
    old = _run_path(asked.run or asked.out)
    source = RunFolder.open(old)
    finished = source.finished()
    if not 0 <= count <= finished.count:
        damage = f" ({finished.problem})" if finished.problem else ""
        raise InputError(
            f"--from-chunk {count}: {old} has {finished.count} finished chunks{damage}",
            f"--from-chunk from 0 to {finished.count}",
        )
    out = asked.out if asked.run is not None else _free_name(asked.out, count)
    if asked.run is not None and RunFolder.beside(out).absolute() == old.absolute():
        raise InputError(f"--out {out} is the run to branch off from", "give the branch another --out")
    asked = dataclasses.replace(asked, out=out)
    path = RunFolder.beside(out)
    _refuse_existing(asked, path)
    state = source.read(count - 1).state if count else None
    about = source.about
    pipeline = _load(asked, about)
    request = _request(pipeline, asked, about, started=state is not None)
    if request.chunks is not None and request.chunks <= count:
        why = f"the branch starts behind chunk {count}, and the video has {request.chunks}: nothing is to be made"
        raise InputError(why, f"--chunks {count + 1}, or more")
    made = _about(asked, pipeline, request, about) | {"first": count, "branch_of": str(old.absolute())}
    job = Job(pipeline, request, out, path, made, state, count, (source, count))
    job.notes.append(f"branches off from {old} behind its first {count} chunks")
    return _checked(job)


# --- what they share ---


def _require_model(asked: Asked) -> None:
    if "model" in asked.model and "size" in asked.model:
        raise InputError("both --model and --size are given", "a --model knows its size; give one of them")
    if "model" in asked.model or "size" in asked.model:
        return
    raise InputError(
        "which model? Give one of these:\n"
        "  --model PATH|REPO      a Helios checkpoint: a folder in the published layout, or a hub repository\n"
        "  --size tiny|mini|14b   no checkpoint: a network of that size with random weights. Its video is noise, and\n"
        "                         RANDOM WEIGHTS stands in it; 14b needs the memory of the real one",
        'helios generate "a lighthouse in a storm" --size tiny --chunks 2 --out storm.mp4',
    )


def _load(asked: Asked, about: Mapping[str, Any]) -> Pipeline:
    import helios

    named = dict(asked.model)
    if "model" not in named and "size" not in named:
        named = {**about["model"], **named}
    kept = about.get("execution", {})
    # As everywhere, option before variable; but a run goes on where it was before anything is chosen anew.
    backend = asked.backend or os.environ.get("HELIOS_BACKEND") or kept.get("backend")
    same = backend is not None and backend.partition(":")[0] == kept.get("backend", "").partition(":")[0]
    return helios.load(
        named.get("model"),
        size=named.get("size"),
        variant=named.get("variant"),
        backend=backend,
        backend_options={**(kept.get("options", {}) if same else {}), **asked.backend_options},
        precision=asked.precision or kept.get("precision"),
        fallback=asked.fallback or os.environ.get("HELIOS_FALLBACK") or kept.get("fallback") or "error",
        vae_precision=asked.vae_precision or _kept_vae(kept),
    )


def _kept_vae(kept: Mapping[str, Any]) -> str | None:
    """In what a run decodes that is gone on with; one that does not say was made when all decoded as published."""
    from helios.model.vae_precision import published_vae_precision

    return kept.get("vae_precision", published_vae_precision(kept["precision"])) if "precision" in kept else None


def _request(pipeline: Pipeline, asked: Asked, about: Mapping[str, Any], *, started: bool = False) -> Request:
    """The request of the options, completed with those of an earlier run.

    Of a run that has started, the image or video is in its state, and is read only if it is named again.
    """
    settings = {**about.get("settings", {}), **asked.settings}
    if not started and not {"image", "video"} & set(asked.settings):
        settings |= about.get("start", {})
    prompt, schedule = asked.prompt, asked.schedule
    if prompt is None and schedule is None:
        prompt, schedule = about.get("prompt"), about.get("schedule")
    if schedule is not None:
        if prompt is not None:
            raise InputError("both a PROMPT and --prompts are given", "make the prompt the first line of the file")
        settings["prompts"] = [part if isinstance(part, str) else tuple(part) for part in schedule]
    if prompt is None and schedule is None:
        raise InputError("there is no prompt", 'describe the video: helios generate "a lighthouse in a storm" …')
    length = dict(asked.length) or about.get("length", {})
    return pipeline.request(prompt, **settings, **length)


def _about(asked: Asked, pipeline: Pipeline, request: Request, old: Mapping[str, Any]) -> dict[str, Any]:
    """What ``run.json`` says: enough to go on with the run when nothing but its name is given."""
    kept = {name: value for name, value in request.settings().items() if name not in _NOT_KEPT and value is not None}
    if not kept["negative_prompt"]:
        del kept["negative_prompt"]
    named = dict(asked.model) if {"model", "size"} & set(asked.model) else {**old["model"], **asked.model}
    if "model" in named and Path(named["model"]).exists():
        named["model"] = str(Path(named["model"]).absolute())
    given = {name: str(Path(asked.settings[name]).absolute()) for name in ("image", "video") if name in asked.settings}
    script = request.script.parts if request.script is not None else None
    return {
        "model": named,
        "execution": {
            "backend": pipeline.backend.label,
            **({"options": dict(pipeline.backend.chosen)} if pipeline.backend.chosen else {}),
            "precision": pipeline.precision,
            "vae_precision": pipeline.vae_precision,
            "fallback": pipeline.fallback,
        },
        "prompt": None if script else request.texts[0],
        "schedule": script,
        "settings": kept,
        "start": given or old.get("start", {}),
        "length": dict(asked.length) or old.get("length", {}),
        "first": 0,
        "size": [request.height, request.width],
        "random_weights": pipeline.random_weights,
        "metadata": _metadata(pipeline, request, named),
    }


def _metadata(pipeline: Pipeline, request: Request, named: Mapping[str, str]) -> dict[str, str]:
    """What the video says about itself: the same for every chunk, so that the same frames give the same bytes."""
    import helios

    random = pipeline.random_weights
    model = Path(named["model"]).name if "model" in named else named["size"]
    return {
        "title": request.texts[0],
        "comment": "RANDOM WEIGHTS: this video is noise" if random else "generated video",
        "random_weights": str(random).lower(),
        "model": f"{model} {pipeline.variant}",
        "prompts": json.dumps(request.script.parts if request.script else request.texts, ensure_ascii=False),
        "seed": str(request.seed),
        "helios": helios.__version__,
    }


def _checked(job: Job) -> Job:
    """What costs time comes last: room on the disk, then the graphs and the weights."""
    from helios.media import need_space
    from helios.media.writing import SegmentWriter
    from helios.pipeline.store import chunk_bytes

    request, left = job.request, job.chunks - job.done
    if left <= 0:
        return job
    SegmentWriter(job.path, size=(request.height, request.width))
    factor = job.pipeline.model.vae.scale_factor_spatial
    frame = 4 * job.pipeline.model.vae.z_dim * (request.height // factor) * (request.width // factor)
    a_chunk = chunk_bytes(request.height, request.width, 9 * frame, request.window.length * frame)
    need_space(
        job.path,
        (left + (job.origin[1] if job.origin else 0)) * a_chunk,
        purpose=f"a video of {output.count(left, 'chunk')}",
    )
    job.pipeline.plan(request, job.state)
    return job


def _refuse_existing(asked: Asked, path: Path) -> None:
    kept = any(path.glob("chunk-*.safetensors"))  # a run without one has nothing that could be lost
    if asked.overwrite or not (asked.out.exists() or kept):
        return
    what = asked.out if asked.out.exists() else path
    fix = "--resume goes on with it, --overwrite replaces it, --from-chunk K branches off from it"
    raise InputError(f"{what} exists already", f"{fix}; or give another --out")


def _run_path(named: Path) -> Path:
    """The run folder that a video or the folder itself names."""
    from helios.pipeline.store import RunFolder

    return named if (named / "run.json").is_file() else RunFolder.beside(named)


def _free_name(out: Path, chunk: int) -> Path:
    """A name beside a video for a branch of it, which nothing has yet."""
    from helios.pipeline.store import RunFolder

    number = 1
    while True:
        more = f"-{number}" if number > 1 else ""
        name = out.with_name(f"{out.stem}-from{chunk}{more}{out.suffix}")
        if not name.exists() and not RunFolder.beside(name).exists():
            return name
        number += 1


def _renewed(made: Mapping[str, Any], folder: RunFolder, finished: Finished) -> dict[str, Any]:
    """What ``run.json`` is to say when a run goes on.

    As long as no chunk of its own is finished, anything may change; then only its length and where its model lies.
    """
    about, made = folder.about, json.loads(json.dumps(made))
    if finished.count > about["first"]:
        return {**about, "model": made["model"], "length": made["length"]}
    kept = {name: about[name] for name in ("format", "first", "branch_of") if name in about}
    shaping = ("settings", "prompt", "schedule", "execution", "start")
    changed = [
        f"{name}: {about[name]} was saved, {made[name]} is asked for" for name in shaping if about[name] != made[name]
    ]
    if finished.problem:  # later chunks are there, and must not be mixed with others
        _refuse(changed, folder.path, finished)
    return {**made, **kept}


def _model_difference(state: RunState, pipeline: Pipeline, asked: Asked, about: Mapping[str, Any]) -> str:
    if state.plan.get("model") == pipeline.model.identity:
        return ""
    words = [" ".join(str(named[key]) for key in _MODEL if named.get(key)) for named in (about["model"], asked.model)]
    saved, came = words
    return f"model: {saved!r} was saved, {came or saved!r} is asked for, and its weights or configs are others"


def _differences(asked: Asked, request: Request, state: RunState, finished: Finished, first: int) -> list[str]:
    """One line for each thing that is asked for otherwise than the finished chunks were made."""
    settings = request.settings()
    if not {"image", "video"} & set(asked.settings):
        settings |= {name: state.settings.get(name) for name in ("kind", "given")}
    found = state.differences(settings)
    for chunk in range(first, min(finished.count, request.chunks or 0)):
        wanted = request.script.wanted(chunk) if request.script is not None else request.texts[0]
        if finished.prompts[chunk] != (wanted,):
            found.append(f"prompt of chunk {chunk}: {finished.prompts[chunk][0]!r} was saved, {wanted!r} is asked for")
            break
    return found


def _refuse(differences: Sequence[str], path: Path, finished: Finished) -> None:
    found = [one for one in differences if one]
    if found:
        raise StateError(
            f"the run in {path} has other settings: {'; '.join(found)}",
            f"leave these options out to go on as it began, or branch off with them: --from-chunk {finished.count}",
        )
