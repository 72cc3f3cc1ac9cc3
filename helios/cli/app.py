"""The ``helios`` command: what there is, in which panel, and how a mistake ends.

Commands import torch when they run, not before: help, completion and ``helios doctor`` work where torch does not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import helios
from helios.cli import backends, bench, doctor, export, extensions, fit, generate, graph, new_backend, ops, output
from helios.cli.options import CERTIFY, MAKE_VIDEO, PORT
from helios.errors import HeliosError

__all__ = ["app", "main"]

app = typer.Typer(
    name="helios",
    cls=extensions.Commands,
    help="Helios: video from a prompt, chunk by chunk, on any device.",
    epilog="Start with `helios doctor`; each command has its own --help.",
    invoke_without_command=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"helios-hal {helios.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Helios: video from a prompt, chunk by chunk, on any device.."""
    if context.invoked_subcommand is None:
        text = context.get_help()  # printed already, and empty, where rich writes it
        if text:
            typer.echo(text)
        raise typer.Exit(2)


# One line a command; the order here is the order of the help, and the first panel is the one that most people need.
app.command("generate", rich_help_panel=MAKE_VIDEO, epilog=generate.EXAMPLES)(generate.generate)
app.command("fit", rich_help_panel=MAKE_VIDEO, epilog=fit.EXAMPLES)(fit.fit)
app.command("doctor", rich_help_panel=MAKE_VIDEO)(doctor.doctor)
app.command("backends", rich_help_panel=PORT)(backends.backends)
app.command("ops", rich_help_panel=PORT, epilog=ops.EXAMPLES)(ops.ops)
app.command("graph", rich_help_panel=PORT, epilog=graph.EXAMPLES)(graph.graph)
app.add_typer(export.app, name="export", rich_help_panel=PORT)
app.command("new-backend", rich_help_panel=PORT, epilog=new_backend.EXAMPLES)(new_backend.new_backend)
app.command("bench", rich_help_panel=CERTIFY, epilog=bench.EXAMPLES)(bench.bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code.

    2 for a mistake of the user's, told in a line with its fix and no traceback; 130 after Ctrl-C; 1 where the reader of
    a pipe went away. Any other exception is a defect and keeps its traceback.
    """
    command = typer.main.get_command(app)
    try:
        result = command.main(args=arguments, prog_name="helios", standalone_mode=False)
        sys.stdout.flush()
    except HeliosError as error:
        output.fail(error.why, error.fix)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return 1
    except Exception as error:
        if not _is_mistake(error):
            raise
        return 2
    return result if isinstance(result, int) else 0


def _is_mistake(error: Exception) -> bool:
    """Tell what the parser refused, or an environment in which torch cannot start; False for everything else."""
    if hasattr(error, "format_message"):  # every error of the parser has it, whichever release of typer raises it
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "helios"
        output.fail(error.format_message(), f"`{path} --help` lists what there is")
        return True
    if "TORCH_DEVICE_BACKEND_AUTOLOAD" in str(error):
        why = f"torch cannot start, because of a device package that it loads by itself: {error}".splitlines()[0]
        output.fail(why, "export TORCH_DEVICE_BACKEND_AUTOLOAD=0, then run again; `helios doctor` says more")
        return True
    return False
