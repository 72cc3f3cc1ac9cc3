"""``helios export``: the graphs of a model as files that other engines run, and whether such files are whole."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import helios
from helios.cli import output
from helios.cli.options import HeightOption, JsonOption, PyramidStageOption, VaePrecisionOption, WidthOption
from helios.errors import InputError, unknown_name

if TYPE_CHECKING:
    from helios.export.folder import Exported
    from helios.export.manifest import About
    from helios.pipeline.entries import Entries
    from helios.pipeline.model import Model

__all__ = ["EXAMPLES", "app"]

EXAMPLES = "Example: helios export onnx --model PATH_OR_REPO --height 384 --width 640 --out helios-onnx"

app = typer.Typer(
    help="Write a model's graphs as files that other engines run.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

PARTS = ("transformer", "sampler", "vae-decoder", "vae-encoder")
FREE = ("height", "width", "text")


OutOption = Annotated[Path, typer.Option(metavar="DIR", help="A new folder.")]
RandomSizeOption = Annotated[
    str | None, typer.Option(metavar="tiny|mini|14b", help="Instead of a model: random weights.", show_default=False)
]
ModelOption = Annotated[
    str | None, typer.Option(metavar="PATH|REPO", help="A model folder, or a hub repository.", show_default=False)
]
OwnVariantOption = Annotated[
    str | None,
    typer.Option(metavar="base|mid|distilled", help="Way to sample.", show_default="the model's, or distilled"),
]
BatchOption = Annotated[int, typer.Option(metavar="N", help="Videos that run together.")]
TokensOption = Annotated[int, typer.Option(metavar="N", help="Length of the prompt's embedding.")]
DynamicOption = Annotated[
    str | None, typer.Option(metavar="height,width,text", help="Leave these sizes open.", show_default="exact sizes")
]
TransformerPrecisionOption = Annotated[
    str, typer.Option(metavar="fp32|bf16|fp16", help="Of the transformer's arithmetic and weights.")
]
GroupOption = Annotated[int, typer.Option(metavar="N", help="Latents that the VAE takes at a time.")]
FormOption = Annotated[
    str, typer.Option(metavar="standard|annotated", help="Ops of ONNX alone, or a function for each Helios op.")
]
OpsetOption = Annotated[int, typer.Option(metavar="N", help="Of ONNX, 18 to 23.")]
PartOption = Annotated[
    list[str] | None,
    typer.Option(metavar="|".join(PARTS), help="As often as needed.", show_default="transformer, sampler"),
]


@app.command(epilog=EXAMPLES)
def onnx(
    out: OutOption,
    size: RandomSizeOption = None,
    model: ModelOption = None,
    variant: OwnVariantOption = None,
    pyramid_stage: PyramidStageOption = None,
    height: HeightOption = 384,
    width: WidthOption = 640,
    batch: BatchOption = 1,
    text_tokens: TokensOption = 512,
    dynamic: DynamicOption = None,
    precision: TransformerPrecisionOption = "bf16",
    vae_precision: VaePrecisionOption = None,
    vae_group: GroupOption = 3,
    form: FormOption = "standard",
    opset: OpsetOption = 23,
    part: PartOption = None,
    json: JsonOption = False,
) -> None:
    """Write ONNX models, the weights that they share, and a manifest that says how to run them.

    One model a phase and entry: what runs once, once a prompt, once a chunk, and at each step. Needs no device.
    """
    from helios.export.emitter import Options
    from helios.export.folder import export, require_onnx
    from helios.model.vae_precision import VAE_DTYPES
    from helios.pipeline.entries import BothWeights, Entries
    from helios.precision import precision as named

    require_onnx()
    options = Options(form, opset)  # type: ignore[arg-type]
    chosen = _model(size, model, variant)
    decoding = _decoding(vae_precision, precision)
    parts = part or PARTS[:2]
    asked = Entries(
        chosen,
        height,
        width,
        batch,
        text_tokens,
        named(precision),
        parts,
        pyramid_stage,
        VAE_DTYPES[decoding],
        vae_group,
    )
    free = _free(dynamic)
    plans = [entries.plan(local_constants=bool(free)) for entries in _samples(asked, free)]
    about = _about(asked, free, decoding)
    with _Progress() as progress:
        made = export(out, plans, BothWeights(chosen), about, options, progress=progress)
    _tell(made, as_json=json)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `helios export` wrote.", show_default=False)],
    json: JsonOption = False,
) -> None:
    """Read a folder of exported models and compare every file, and every weight, with its digest."""
    from helios.export.folder import load

    _tell(load(folder), as_json=json, verified=True)


def _model(size: str | None, model: str | None, variant: str | None) -> Model:
    from helios.pipeline.model import folder_model, sized_model

    if (size is None) == (model is None):
        raise InputError("an export is of a model, or of a size with random weights", "--model PATH, or --size tiny")
    return sized_model(size, variant) if size is not None else folder_model(str(model), variant)


def _decoding(asked: str | None, precision: str) -> str:
    from helios.model.vae_precision import VAE_DTYPES, published_vae_precision

    chosen = published_vae_precision(precision) if asked is None else asked
    if chosen not in VAE_DTYPES:
        raise InputError(unknown_name("VAE precision", chosen, VAE_DTYPES), "--vae-precision fp32")
    return chosen


def _free(text: str | None) -> list[str]:
    names = [name.strip() for name in text.split(",")] if text is not None else []
    for name in names:
        if name not in FREE:
            raise InputError(unknown_name("size to leave open", name, FREE), f"--dynamic {','.join(FREE)}")
    return names


SAMPLES = ((2, 3, 1), (3, 2, 2), (4, 3, 5), (3, 5, 3), (5, 4, 2), (2, 6, 4), (6, 2, 7))
"""Height and width in units, text in eights: varied so that each may be told from the others, two to each term."""


def _samples(asked: Entries, free: Sequence[str]) -> list[Entries]:
    """The same at other sizes, where sizes are to be left open; the first is what was asked for."""
    from dataclasses import replace

    if not free:
        return [asked]
    unit = _unit(asked)
    for name in ("height", "width"):
        if name in free and getattr(asked, name) % unit:
            why = f"{name} {getattr(asked, name)}: models of free size are for multiples of {unit} pixels"
            raise InputError(why, f"--{name} {max(unit, round(getattr(asked, name) / unit) * unit)}")
    fields = {"height": ("height", unit, 0), "width": ("width", unit, 1), "text": ("text_tokens", 8, 2)}
    sizes = [{fields[n][0]: fields[n][1] * sample[fields[n][2]] for n in free} for sample in SAMPLES]
    return [asked, *(replace(asked, **size) for size in sizes)]  # type: ignore[arg-type]


def _unit(asked: Entries) -> int:
    """Pixels in which the history's coarsest patches are whole, so that nothing is padded at one size only."""
    import math

    patch = math.lcm(*asked.model.transformer.patch_size[1:])
    return math.lcm(asked.multiple, 4 * patch * asked.model.vae.scale_factor_spatial)


def _about(asked: Entries, free: Sequence[str], decoding: str) -> About:
    from helios.export.manifest import About

    model = asked.model
    sizes: dict[str, Any] = {"height": asked.height, "width": asked.width}
    sizes |= {"batch": asked.batch, "text_tokens": asked.text_tokens}
    if free:
        sizes["dynamic"] = {name: _allowed(asked, name) for name in free}
    known = {"name": model.name, "variant": model.variant.name, "identity": model.identity}
    vae = decoding if {"vae-decoder", "vae-encoder"} & set(asked.parts) else ""
    told = {**known, "random_weights": model.random_weights}
    given = GIVEN if "transformer" in asked.parts else {}
    return About(told, asked.precision.name, sizes, given, asked.programs(), vae, helios.__version__)


GIVEN = {
    "text": "embeddings of the prompt, zeros behind its tokens",
    "history_long": "the 16 latent frames furthest back, zeros where there are none",
    "history_mid": "the 2 latent frames after those",
    "history_short": "the anchor (the first latent frame of the video; zeros in the first chunk), and the newest one",
}


def _allowed(asked: Entries, name: str) -> dict[str, int]:
    from helios.export.forms.rope import LARGEST

    if name == "text":
        return {"multiple": 1}
    axis = 1 if name == "height" else 2
    pixels = asked.model.vae.scale_factor_spatial * asked.model.transformer.patch_size[axis]
    return {"multiple": _unit(asked), "largest": LARGEST * pixels}


QUIET_SECONDS = 10.0
"""Between two plain lines about bytes."""


class _Progress:
    """Bytes of weights: a bar where there is a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._told = time.perf_counter()

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("weights", total=None)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, written: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=written, total=total)
        elif time.perf_counter() - self._told >= QUIET_SECONDS:
            self._told = time.perf_counter()
            typer.echo(f"weights: {output.gigabytes(written)} of {output.gigabytes(total)}", err=True)


def _tell(made: Exported, *, as_json: bool, verified: bool = False) -> None:
    told = made.manifest
    if as_json:
        output.print_json({"path": str(made.path), "verified": verified, "manifest": told})
        return
    size = told["sizes"]
    typer.echo(f"{told['model']['name']}, {told['precision']}, {told['form']} form, opset {told['onnx_opset']}")
    if told["model"]["random_weights"]:
        output.line(told["notice"], "bold yellow")
    free = f", free: {', '.join(size['dynamic'])}" if "dynamic" in size else ""
    output.line(
        f"{size['width']}×{size['height']} pixels, batch {size['batch']}, {size['text_tokens']} text tokens{free}"
    )
    often = {"weights": "once", "prompt": "once a prompt", "chunk": "once a chunk"}
    rows = [
        (m["file"], often.get(m["rate"], "a step"), len(m["inputs"]), len(m["weights"]), output.gigabytes(m["bytes"]))
        for m in told["models"]
    ]
    output.table(["model", "runs", "inputs", "weights", "size"], rows, right=["inputs", "weights", "size"])
    data = told["data"]
    weights = output.count(len(told["weights"]), "weight")
    output.line(f"{data['file']}: {weights}, {output.gigabytes(data['bytes'])}, each once")
    if verified:
        output.line("every file and every weight is as it was written", "green")
    typer.secho(f"{made.path}: {output.count(len(told['models']), 'model')}, manifest.json", bold=True)
