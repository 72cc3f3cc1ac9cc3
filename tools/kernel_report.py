"""Compile every Triton kernel for every architecture, without a GPU, and write docs/kernels.md and docs/kernels.json.

    python tools/kernel_report.py [--architectures sm_90 …] [--default-only] [--out out/kernels] [--write]

What is compiled: the launches of the 14b plans at 384×640 in bf16 (denoising, sampler, VAE), in fp8-weights and, where
tensor cores multiply e4m3 numbers, in fp8-attention, in the layouts that the kernels really leave; and of each op's
samples at real sizes in bf16 and fp32. The tile that an architecture would choose is compiled for all of these; every
other candidate for one launch of each kernel and key. Ends with 1 where something is wrong: see
``helios_cuda.offline.problems``. What was compiled once is remembered in ``--out``.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helios import op
from helios.backend import Kernel
from helios.errors import HeliosError
from helios.fit.costs import LATENT_FRAMES, Setting
from helios.graph import Graph
from helios.lower import plan_for
from helios.model.presets import SIZES, VARIANTS
from helios.model.vae import decode_graph
from helios.ops import quantize
from helios.pipeline.denoise import Layout, denoise_graphs
from helios.pipeline.history import Window
from helios.precision import precision
from helios_cuda import CudaBackend, offline, tables
from helios_cuda.architectures import ARCHITECTURES
from helios_cuda.backend import E4M3_FROM, OF_E4M3
from helios_cuda.launch import Launch
from helios_cuda.offline import Binary, Form
from helios_cuda.tables import Tile

ROOT = Path(__file__).resolve().parent.parent
PLANS = ("bf16", "fp8-attention", "fp8-weights")
"""Precisions whose plans are compiled: fp8 is a part of fp8-attention."""


@dataclasses.dataclass
class Use:
    """A launch on one architecture with the tile that is chosen there, and how often the plan has it."""

    launch: Launch
    form: Form
    count: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One binary and what is wrong with it."""

    architecture: str
    form: Form
    chosen: bool
    launches: int
    binary: Binary
    wrong: tuple[str, ...]


def plan_graphs(name: str = "bf16") -> Mapping[str, Graph]:
    """The graphs of one chunk as the CUDA backend gets them: denoising, sampler, and the VAE's decoding in one pass.

    Args:
        name: of the precision; one that quantises decodes as its working dtype does, and has no graph of that.
    """
    setting = Setting(SIZES["14b"], VARIANTS["distilled"])
    variant, of = setting.variant, precision(name)
    layout = Layout(setting.batch, *setting.latent, setting.text_tokens, Window())
    graphs = denoise_graphs(setting.size.transformer, variant.scheduler, variant.pipeline, layout, of)
    if not of.quantised:
        graphs["decode"] = decode_graph(
            setting.size.vae,
            batch=setting.batch,
            latents=LATENT_FRAMES,
            height=setting.height,
            width=setting.width,
            dtype=of.dtype,
            first=True,
            caches=False,
        )
    return plan_for(graphs, CudaBackend()).graphs


def uses(plans: Mapping[str, Mapping[str, Graph]], architecture: str) -> list[Use]:
    """Every form that an architecture launches, once; with the plan that has it most often.

    Args:
        plans: graphs of a chunk, by the name of the precision.
    """
    found: dict[str, Use] = {}
    multiplies = _multiplies(architecture)
    with tables.assumed(architecture):
        for name, graphs in plans.items():
            if multiplies or precision(name).products != "e4m3":
                launches = list(_of_plan(graphs, architecture))
                counts = collections.Counter(form.name for _, form in launches)
                for launch, form in launches:
                    use = found.setdefault(form.name, Use(launch, form))
                    use.count = max(use.count, counts[form.name])
        for launch in _of_samples(multiplies):
            form = offline.form_of(launch)
            found.setdefault(form.name, Use(launch, form))
    return list(found.values())


def _multiplies(architecture: str) -> bool:
    """Whether its tensor cores multiply e4m3 numbers."""
    return ARCHITECTURES[architecture].capability >= 10 * E4M3_FROM[0] + E4M3_FROM[1]


def _of_plan(graphs: Mapping[str, Graph], architecture: str) -> Iterator[tuple[Launch, Form]]:
    kernels = CudaBackend().kernels
    others = {"conv3d": Kernel(_boxes, kernels["conv3d"].prepare, kernels["conv3d"].weights)}
    if ARCHITECTURES[architecture].capability < 90:
        others = {}
    for graph in graphs.values():
        for ran in offline.replay(graph, kernels, others):
            for launch in ran.launches:
                yield launch, offline.form_of(launch)


def _boxes(w: Any, x: Tensor, *, stride: tuple[int, int, int], padding: tuple[int, int, int]) -> None:
    """The other of our convolutions, where it can run."""
    from helios_cuda.kernels import conv_boxes
    from helios_cuda.kernels.layouts import channels_last

    if not conv_boxes.fits(channels_last(x), w.weight, stride):
        conv_boxes.conv3d(x, w.weight, w.bias, padding)


def _of_samples(multiplies: bool) -> Iterator[Launch]:
    """Of every op that an architecture can run; quantised ones have one working dtype."""
    from helios_cuda.kernels import KERNELS

    for name in sorted(KERNELS):
        if name in OF_E4M3 and not multiplies:
            continue
        dtypes = (torch.bfloat16,) if name in quantize.__all__ else (torch.bfloat16, torch.float32)
        for sample in op.get(name).samples():
            for dtype in dtypes:
                yield from offline.of_sample(name, KERNELS[name], sample, dtype) if sample.big else ()


class Compiler:
    """Compiles and remembers, by what decides about a binary: the form, which has its source, tile, architecture."""

    def __init__(self, folder: Path) -> None:
        import triton

        self.path, self.version = folder / "results.json", triton.__version__
        self.known: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.fresh = 0

    def __call__(self, form: Form, architecture: str) -> Binary:
        key = f"{self.version} {architecture} {form.name}"
        if key not in self.known:
            self.known[key] = dataclasses.asdict(offline.compiled(form, architecture))
            self.fresh += 1
            if self.fresh % 20 == 0:
                self.save()
        return _binary(self.known[key])

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.known))


def _binary(saved: Mapping[str, Any]) -> Binary:
    access = {name: {int(width): n for width, n in widths.items()} for name, widths in saved["access"].items()}
    return Binary(**{**saved, "access": access})


def _tile(tile: Tile) -> str:
    sizes = " ".join(f"{name}={size}" for name, size in tile.sizes.items())
    return f"{sizes} warps={tile.warps} stages={tile.stages}"


def rows(found: list[Use], architecture: str, compile_: Compiler, *, default_only: bool) -> Iterator[Row]:
    """Compile the chosen tile of every form, and every other that fits of the most used form of each kernel and key."""
    shown = set()
    for use in sorted(found, key=lambda use: -use.count):
        kernel, forms = use.form.kernel, [use.form]
        if not default_only and (kernel.name, use.form.key) not in shown:
            others = [tile for tile in kernel.fitting(architecture) if tile != use.form.tile]
            forms += [offline.form_of(use.launch.retiled(tile)) for tile in others]
        shown.add((kernel.name, use.form.key))
        for form in forms:
            binary, chosen = compile_(form, architecture), form is use.form
            wrong = tuple(offline.problems(form, architecture, binary, chosen=chosen))
            yield Row(architecture, form, chosen, use.count, binary, wrong)


def main() -> int:
    """Compile, report progress, write, and say what is wrong."""
    args = _arguments()
    # A cache of its own, so that the seconds are those of compiling.
    os.environ.setdefault("TRITON_CACHE_DIR", str(args.out.resolve() / "triton"))
    compile_, plans, made = Compiler(args.out), {name: plan_graphs(name) for name in PLANS}, []
    for architecture in args.architectures:
        started, before = time.perf_counter(), compile_.fresh
        found = uses(plans, architecture)
        made += list(rows(found, architecture, compile_, default_only=args.default_only))
        compile_.save()
        count, fresh = sum(row.architecture == architecture for row in made), compile_.fresh - before
        print(f"{architecture}: {count} binaries, {fresh} compiled, {time.perf_counter() - started:.0f} s", flush=True)
    if args.write:
        _write(made, compile_.version)
    wrong = [f"{row.architecture} {_what(row)}: {line}" for row in made for line in row.wrong]
    print("\n".join([*wrong, f"{len(made)} binaries, {len(wrong)} things wrong"]))
    return 1 if wrong else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--default-only", action="store_true", help="no candidates beside the chosen tile")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "kernels", help="remembers what was compiled")
    parser.add_argument("--write", action="store_true", help="write docs/kernels.md and docs/kernels.json")
    return parser.parse_args()


def _what(row: Row) -> str:
    return f"{row.form.kernel.name} [{row.form.key}] {_tile(row.form.tile)}"


def _write(made: list[Row], version: str) -> None:
    commit = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    head = {"commit": commit, "triton": version, "command": " ".join(["python tools/kernel_report.py", *_told()])}
    lines = ",\n ".join(json.dumps(_record(row)) for row in made)
    (ROOT / "docs" / "kernels.json").write_text(json.dumps(head)[:-1] + f', "binaries": [\n {lines}\n]}}\n')
    (ROOT / "docs" / "kernels.md").write_text("\n".join(_document(made, head)) + "\n")


def _told() -> list[str]:
    """The command line, without where things are remembered."""
    words = sys.argv[1:]
    at = words.index("--out") if "--out" in words else len(words)
    return words[:at] + words[at + 2 :]


def _record(row: Row) -> dict[str, Any]:
    binary = row.binary
    return {
        "arch": row.architecture,
        "kernel": row.form.kernel.name,
        "key": row.form.key,
        "tile": _tile(row.form.tile),
        "chosen": row.chosen,
        "launches": row.launches,
        "registers": binary.registers,
        "spilled": binary.spilled,
        "shared": binary.shared,
        "occupancy": round(binary.occupancy, 3),
        "access": {name: " ".join(f"{n}×{w}" for w, n in widths.items()) for name, widths in binary.access.items()},
        "units": binary.units,
        "seconds": round(binary.seconds, 1),
        "wrong": row.wrong,
    }


def _document(made: list[Row], head: Mapping[str, str]) -> Iterator[str]:
    """The lines of docs/kernels.md."""
    names = list(dict.fromkeys(row.architecture for row in made))
    wrong = [f"- {row.architecture} {_what(row)}: {line}" for row in made for line in row.wrong]
    yield from (TEXT % {**head, "count": len(made), "wrong": len(wrong) or "nothing"}).splitlines()
    yield from ["", *wrong] if wrong else []
    yield from ["", f"| kernel | forms | {' | '.join(names)} |", f"| --- | --- |{' --- |' * len(names)}"]
    chosen = collections.defaultdict(list)
    for row in made:
        if row.chosen:
            chosen[row.form.kernel.name, row.architecture].append(row)
    for kernel in dict.fromkeys(row.form.kernel.name for row in made):
        forms = {row.form.name for row in made if row.form.kernel.name == kernel}
        cells = (_cell(chosen[kernel, name]) for name in names)
        yield f"| {kernel} | {len(forms)} | {' | '.join(cells)} |"
    yield from [
        "",
        "<details><summary>sm_90, each form with the tile that is chosen</summary>",
        "",
        *_details(made),
        "",
    ]
    yield "</details>"


TEXT = """# The Triton kernels, compiled

Made by `%(command)s` at commit `%(commit)s` with Triton %(triton)s; not edited by hand. %(count)s binaries,
%(wrong)s wrong. Nothing here was run: these are properties of binaries. Each is in [kernels.json](kernels.json);
without `--default-only` it has every candidate tile for one launch of each kernel and key.

What is compiled are the launches of the 14b plans at 384×640 in bf16, fp8-attention (from sm_89 on) and fp8-weights, in
the layouts that the kernels leave their results in, and each op's samples at real sizes in bf16 and fp32. Wrong is: a
spill or a narrow access (less than 16 bytes by a thread, to an operand of 8 MiB and more that lies evenly) with the
tile that an architecture chooses; more shared memory than the architecture has, or than the tile declares, with any
candidate.

Registers of a thread · KiB of shared memory of a block · part of the multiprocessor's room for warps that blocks fill,
with the tile that is chosen: the worst of the kernel's forms. A dash: the kernel is not launched there."""


def _cell(found: list[Row]) -> str:
    if not found:
        return "–"
    binaries = [row.binary for row in found]
    registers, shared = max(b.registers for b in binaries), max(b.shared for b in binaries) / 1024
    spilled = max(b.spilled for b in binaries)
    text = f"{registers} · {shared:.1f} · {min(b.occupancy for b in binaries):.0%}"
    return text + (f" · **{spilled} B spilled**" if spilled else "")


def _details(made: list[Row]) -> Iterator[str]:
    yield "| kernel, key | tile | launches | registers | shared | room | bytes of accesses | tensor cores, copies | s |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in sorted((r for r in made if r.architecture == "sm_90" and r.chosen), key=_what):
        binary = row.binary
        widths = (f"{name} {'/'.join(map(str, sorted(found)))}" for name, found in binary.access.items())
        units = ", ".join(f"{n} {kind}" for kind, n in binary.units.items())
        yield (
            f"| {row.form.kernel.name}, {row.form.key} | {_tile(row.form.tile)} | {row.launches or ''}"
            f" | {binary.registers} | {binary.shared} | {binary.occupancy:.0%} | {', '.join(widths)}"
            f" | {units} | {binary.seconds:.1f} |"
        )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HeliosError as error:
        sys.exit(str(error))
