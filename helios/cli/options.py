"""Options that several commands share, written once; and how their texts become values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from helios.errors import InputError

if TYPE_CHECKING:
    from helios.fit.costs import Setting

__all__ = [
    "CERTIFY",
    "MAKE_VIDEO",
    "OF_ARITHMETIC",
    "PORT",
    "PRECISIONS",
    "BackendOption",
    "BackendOptionsOption",
    "FallbackOption",
    "HeightOption",
    "JsonOption",
    "MemoryOption",
    "NamedPrecisionOption",
    "PrecisionOption",
    "PyramidStageOption",
    "SizeOption",
    "StepsOption",
    "VaePrecisionOption",
    "VariantOption",
    "WidthOption",
    "backend_options",
    "setting",
]

MAKE_VIDEO, PORT, CERTIFY = "Make video", "Port", "Certify"
"""The panels of the help."""

PRECISIONS = ("bf16", "fp16", "fp32", "fp8", "fp8-attention", "fp8-weights")
"""Their names for help that has to be quick: ``helios.precision`` loads torch. Not ``fp64``, which is the oracle's."""
OF_ARITHMETIC = f"Of the arithmetic: {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}."

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
SizeOption = Annotated[
    str, typer.Option(metavar="tiny|mini|14b", help="Size of the networks; 14b is the published one.")
]
VariantOption = Annotated[str, typer.Option(metavar="base|mid|distilled", help="Published way to sample.")]
PyramidStageOption = Annotated[
    int | None, typer.Option(metavar="N", help="One stage; 0 is the coarsest.", show_default="all of the variant")
]
HeightOption = Annotated[int, typer.Option(metavar="PIXELS", help="Height of the video.")]
WidthOption = Annotated[int, typer.Option(metavar="PIXELS", help="Width of the video.")]
PrecisionOption = Annotated[
    str | None, typer.Option(metavar="NAME", help=OF_ARITHMETIC, show_default="the backend's first")
]
NamedPrecisionOption = Annotated[str, typer.Option(metavar="NAME", help=OF_ARITHMETIC)]
VaePrecisionOption = Annotated[
    str | None,
    typer.Option(metavar="fp32|bf16|fp16", help="Of decoding frames.", show_default="the backend's"),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:PROVIDER][:INDEX]",
        help="What to run on, such as cpu, cuda:1 or ort:cuda; otherwise HELIOS_BACKEND, otherwise the best there is.",
        show_default=False,
    ),
]
BackendOptionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--backend-option",
        metavar="NAME=VALUE",
        help="Of the backend, as often as needed; `helios backends` lists what each has.",
        show_default=False,
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="full|low",
        help="low keeps weights that do not fit in host memory; short for --backend-option memory=low.",
        show_default=False,
    ),
]
FallbackOption = Annotated[
    str | None,
    typer.Option(
        metavar="error|reference",
        help="What to do with an op that the backend has no kernel for; otherwise HELIOS_FALLBACK, otherwise error.",
        show_default=False,
    ),
]
StepsOption = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N,N]", help="Solver steps, one number or one a pyramid stage.", show_default="the variant's"
    ),
]


def backend_options(given: Sequence[str] | None, memory: str | None = None) -> dict[str, str]:
    """``NAME=VALUE``, as often as it was given, and the value of ``--memory``, by name.

    Raises:
        InputError: a text without ``=``, or two values for one name.
    """
    chosen: dict[str, str] = {}
    for text in [*(given or ()), *([] if memory is None else [f"memory={memory}"])]:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise InputError(f"--backend-option {text}: wanted NAME=VALUE", "--backend-option memory=low")
        if chosen.setdefault(name, value) != value:
            raise InputError(f"option {name!r} of the backend is given as {chosen[name]!r} and as {value!r}")
    return chosen


def setting(
    size: str, variant: str, height: int, width: int, precision: str, *, batch: int = 1, text_tokens: int = 512
) -> Setting:
    """The options as one setting, checked."""
    from helios import precision as precisions
    from helios.fit.costs import Setting
    from helios.model import presets

    chosen = presets.size(size), presets.variant(variant)
    return Setting(*chosen, height, width, batch, text_tokens, precisions.precision(precision))
