"""``helios new-backend``: a package to begin with, for a device that Helios does not run on yet."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from helios.cli import output

__all__ = ["EXAMPLES", "new_backend"]

EXAMPLES = "Examples: helios new-backend mychip; helios new-backend mychip --kind torch-device --torch-device xpu"


def new_backend(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the backend, as --backend will take it.")],
    kind: Annotated[
        str,
        typer.Option(
            metavar="kernels|torch-device|engine",
            help="What you have: kernels of your own, a PyTorch device, or a compiler that takes ONNX.",
        ),
    ] = "kernels",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to; a new folder.", show_default="helios-NAME")
    ] = None,
    torch_device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Of kind torch-device: what torch calls it.", show_default="NAME")
    ] = "",
) -> None:
    """Write the package of a new backend, with one op done, its tests and its CI.

    Then `helios certify` says which op to write next, and with which shapes.
    """
    from helios.scaffold import Package, write

    package = Package(name, kind, torch_device)
    folder = out if out is not None else Path(package.distribution)
    files = write(package, folder)
    output.line(f"Wrote {output.count(len(files), 'file')} into {folder}:")
    for path in files:
        output.line(f"  {path.relative_to(folder)}")
    output.heading("Next")
    place = f"./{folder}" if folder.name == str(folder) else str(folder)  # a bare name would be a package of an index
    for words in (
        ["pip", "install", "-e", place],
        ["helios", "backends"],
        ["helios", "certify", "--backend", name, "--level", "ops"],
    ):
        output.command([shlex.quote(word) for word in words])
    output.line()
    output.note(
        f"The last one fails, and lists what to write in {package.module}, in order; README.md goes on from there."
    )
