"""``helios generate``: a video from a prompt."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helios.cli import output
from helios.cli.job import Asked, Job, prepare, read_prompts, resume_command
from helios.cli.options import (
    BackendOption,
    BackendOptionsOption,
    FallbackOption,
    MemoryOption,
    PrecisionOption,
    StepsOption,
    VaePrecisionOption,
    backend_options,
)
from helios.cli.progress import Report
from helios.errors import HeliosError, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from helios.pipeline import Pipeline
    from helios.pipeline.store import RunFolder

__all__ = ["EXAMPLES", "generate"]

EXAMPLES = 'Example: helios generate "a lighthouse in a storm" --model PATH_OR_REPO --chunks 3 --out storm.mp4'
SHEET_FRAMES = 24


PromptArgument = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="What the video shows.", show_default=False)
]
OutOption = Annotated[Path, typer.Option(metavar="FILE.mp4", help="The video; its run is kept beside it.")]
ModelOption = Annotated[
    str | None, typer.Option(metavar="PATH|REPO", help="A model folder, or a hub repository.", show_default=False)
]
RandomSizeOption = Annotated[
    str | None, typer.Option(metavar="tiny|mini|14b", help="Instead of a model: random weights.", show_default=False)
]
OwnVariantOption = Annotated[
    str | None,
    typer.Option(metavar="base|mid|distilled", help="Way to sample.", show_default="the model's, or distilled"),
]
ChunksOption = Annotated[int | None, typer.Option(metavar="N", help="Length in chunks of 33 frames.")]
SecondsOption = Annotated[float | None, typer.Option(metavar="S", help="Length at 24 frames a second.")]
FramesOption = Annotated[
    int | None, typer.Option(metavar="N", help="Length in frames, rounded up to chunks.", show_default="the variant's")
]
OwnHeightOption = Annotated[int | None, typer.Option(metavar="PIXELS", help="Height.", show_default="384")]
OwnWidthOption = Annotated[int | None, typer.Option(metavar="PIXELS", help="Width.", show_default="640")]
GuidanceOption = Annotated[
    float | None, typer.Option(metavar="SCALE", help="Above 1, guides by the prompt.", show_default="the variant's")
]
NegativeOption = Annotated[str | None, typer.Option(metavar="TEXT", help="What guidance leads away from.")]
ImageOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Start from this picture.")]
VideoOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Continue this video of 33 frames or more.")]
PromptsOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Prompts that take turns, one a line; `a prompt | 3` is for 3 chunks, not 7."),
]
SeedOption = Annotated[int | None, typer.Option(metavar="N", help="Of the noise.", show_default="0")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run of --out, to the same bits.")]
FromChunkOption = Annotated[
    int | None, typer.Option(metavar="K", help="Keep the first K chunks of a run and branch off.", show_default=False)
]
RunOption = Annotated[
    Path | None, typer.Option(metavar="FILE.mp4", help="The run to branch off from.", show_default="that of --out")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the video of --out and its run.")]
SheetOption = Annotated[bool, typer.Option("--sheet", help="Also write 24 of its frames side by side, as FILE.png.")]


def generate(
    prompt: PromptArgument = None,
    out: OutOption = Path("video.mp4"),
    model: ModelOption = None,
    size: RandomSizeOption = None,
    variant: OwnVariantOption = None,
    chunks: ChunksOption = None,
    seconds: SecondsOption = None,
    frames: FramesOption = None,
    height: OwnHeightOption = None,
    width: OwnWidthOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    negative: NegativeOption = None,
    image: ImageOption = None,
    video: VideoOption = None,
    prompts: PromptsOption = None,
    seed: SeedOption = None,
    backend: BackendOption = None,
    backend_option: BackendOptionsOption = None,
    memory: MemoryOption = None,
    precision: PrecisionOption = None,
    vae_precision: VaePrecisionOption = None,
    fallback: FallbackOption = None,
    resume: ResumeOption = False,
    from_chunk: FromChunkOption = None,
    run: RunOption = None,
    overwrite: OverwriteOption = False,
    sheet: SheetOption = False,
) -> None:
    """Make a video, chunk by chunk.

    Each finished chunk is kept beside the video: a run can be stopped, resumed, and branched off from.
    """
    begin = time.perf_counter()
    settings = _given(height=height, width=width, guidance=guidance, seed=seed, image=image, video=video)
    asked = Asked(
        prompt,
        read_prompts(prompts) if prompts is not None else None,
        _given(model=model, size=size, variant=variant),
        settings | _given(steps=_steps(steps), negative_prompt=negative),
        _given(chunks=chunks, frames=frames, seconds=seconds),
        out,
        backend,
        precision,
        fallback,
        resume,
        overwrite,
        from_chunk,
        run,
        backend_options(backend_option, memory),
        vae_precision,
    )
    job = prepare(asked)
    _introduce(job)
    _make(job, begin, sheet=sheet)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _steps(text: str | None) -> tuple[int, ...] | int | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"--steps {text}: wanted numbers of at least 1", "--steps 2, or one a stage: --steps 2,2,2")
    return int(parts[0]) if len(parts) == 1 else tuple(map(int, parts))


def _introduce(job: Job) -> None:
    request, pipeline = job.request, job.pipeline
    options = "".join(f", {name} {value}" for name, value in pipeline.backend.unusual.items())
    where = f"on {pipeline.backend.label}{options} in {pipeline.precision}{_decoding(pipeline)}"
    typer.echo(f"{pipeline.model.name}, {where}")  # a path is not wrapped
    if pipeline.random_weights:
        output.line("RANDOM WEIGHTS: the video is noise, and says so in its frames and its metadata", "bold yellow")
    steps = ",".join(map(str, request.steps))
    output.line(f"{request.kind} to video, {request.width}×{request.height}, steps {steps}, seed {request.seed}")
    output.line(f"asked for {request.asked}: {_length(job.chunks)}")
    coverage = pipeline.coverage
    if coverage is not None and coverage.fallbacks:
        output.line(f"fallback: {coverage.fallbacks}")
    for note in job.notes:
        typer.echo(f"note: {note}")
    if 0 < job.done < job.chunks:
        output.line(f"{output.count(job.done, 'chunk')} of {job.chunks} are there; the others follow")


def _decoding(pipeline: Pipeline) -> str:
    """In what frames are decoded, where that is not as published, or not what the backend would do by itself."""
    from helios.model.vae_precision import choose_vae_precision, published_vae_precision

    precision, vae = pipeline.precision, pipeline.vae_precision
    usual = {published_vae_precision(precision), choose_vae_precision(None, precision, pipeline.backend)}
    return "" if usual == {vae} else f", VAE in {vae}"


def _length(chunks: int) -> str:
    from helios.pipeline import FPS, returned_frames

    count = returned_frames(chunks)
    return f"{output.count(chunks, 'chunk')} of 33 frames make a video of {count} frames ({count / FPS:.2f} s)"


def _make(job: Job, begin: float, *, sheet: bool) -> None:
    from helios.pipeline.store import lock

    report = Report(job.chunks)
    prepared = time.perf_counter() - begin
    with lock(job.path):
        try:
            folder = job.begin()
            with report:
                _repair(job, folder)
                _run(job, folder, report)
        except KeyboardInterrupt:
            _stopped(job)
            raise typer.Exit(130) from None
        except HeliosError:
            _say_kept(job)
            raise
        frames = _join(job, folder, job.chunks)
        picture = _sheet(job, folder) if sheet else None
    _summarise(job, report, prepared, time.perf_counter() - begin)
    if picture is not None:
        typer.echo(f"contact sheet: {picture}")
    typer.echo(f"kept for --resume and --from-chunk: {job.path}")
    returned = f"asked for {job.request.asked}, {output.count(frames, 'frame')} returned"
    typer.secho(f"{job.out}: {returned}", bold=True)


def _run(job: Job, folder: RunFolder, report: Report) -> None:
    """Make the chunks that are missing; each is on disk before the next one is asked for."""
    if job.done >= job.chunks:
        output.line("this run is complete: its segments are joined again, and nothing is computed")
        return
    for chunk in job.pipeline.run(job.request, job.state, report.step):
        begin = time.perf_counter()
        folder.save(chunk, _shown(job, chunk.frames))
        job.done = chunk.index + 1
        report.chunk(chunk.index, chunk.frames.shape[1], chunk.timings, time.perf_counter() - begin)
        for warning in chunk.warnings:
            report.warn(warning)


def _shown(job: Job, frames: Tensor) -> Tensor:
    """The one video of a batch as it is to be seen."""
    from helios.media import mark_random

    return (mark_random(frames) if job.pipeline.random_weights else frames)[0]


def _repair(job: Job, folder: RunFolder) -> None:
    """Encode again what was lost of finished chunks; their latents are there."""
    from helios.pipeline.store import decode_again

    for chunk in range(min(job.done, job.chunks)):
        if not folder.segment_is_whole(chunk):
            folder.rewrite_segment(chunk, _shown(job, decode_again(job.pipeline.codec, folder.read(chunk))))
            output.line(
                f"note: the segment of chunk {chunk} was lost or damaged, and is decoded again from its latents"
            )


def _join(job: Job, folder: RunFolder, chunks: int) -> int:
    from helios.media import join
    from helios.pipeline import returned_frames

    frames = returned_frames(chunks)
    told = {"asked": job.request.asked, "returned": f"{frames} frames"}
    segments = [folder.segment(chunk) for chunk in range(chunks)]
    return join(segments, job.out, frames=frames, metadata={**folder.about["metadata"], **told})


def _stopped(job: Job) -> None:
    """After Ctrl-C: close a file that plays."""
    # The disk knows best: the signal may have come between a chunk's last byte and the next line of the program.
    done = job.folder.finished().count if job.folder is not None else 0
    if job.folder is not None and done:
        frames = _join(job, job.folder, min(done, job.chunks))
        typer.echo(f"stopped: {job.out} holds {output.count(frames, 'frame')}, {done} of {job.chunks} chunks")
    else:
        output.line("stopped before the first chunk was finished")
    typer.echo(f"to go on: {shlex.join(resume_command(job.out))}")


def _say_kept(job: Job) -> None:
    if job.done:
        kept = f"{output.count(job.done, 'finished chunk')} kept in {job.path}"
        typer.echo(f"{kept}; to go on after the error below: {shlex.join(resume_command(job.out))}", err=True)


def _sheet(job: Job, folder: RunFolder) -> Path:
    """Frames of the whole video, evenly spaced; read a segment at a time, so that length needs no memory."""
    import torch

    from helios.media import contact_sheet, read_video
    from helios.pipeline import frames_of_chunks, returned_frames

    each, total = frames_of_chunks(1), returned_frames(job.chunks)
    chosen = [i * (total - 1) // (SHEET_FRAMES - 1) for i in range(SHEET_FRAMES)]
    height, width = job.request.height, job.request.width
    tiles = []
    for chunk in range(job.chunks):
        wanted = [frame % each for frame in chosen if frame // each == chunk]
        if wanted:
            tiles.append(read_video(folder.segment(chunk), height=height, width=width)[wanted])
    return contact_sheet(torch.cat(tiles), job.out.with_suffix(".png"), tile_width=min(width, 160))


def _summarise(job: Job, report: Report, prepared: float, total: float) -> None:
    if not report.frames:
        return
    rows = [("prepare", output.seconds(prepared), "")]
    made = report.seconds["total"] + report.seconds["write"]
    for part in ("text", "history", "denoise", "decode", "write"):
        spent = report.seconds[part]
        rows.append((part, output.seconds(spent), f"{spent / made:.0%}"))
    rows.append(("together", output.seconds(total), ""))
    output.heading(f"{output.count(report.frames, 'frame')} at {report.frames / made:.3g} FPS")
    output.table(["part", "time", "of the chunks"], rows, right=["time", "of the chunks"])
