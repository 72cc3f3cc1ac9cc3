"""What each precision costs in accuracy: error, cosine and PSNR of every step's velocity against float64.

    python tools/precision.py [--layers 12] [--height 16] [--width 24] [--seeds 2] [--precision bf16 …]

Runs on the CPU by the op bodies: the arithmetic that every backend is judged against, not any device's. The network has
the heads, the feed-forward and the width of ``mini``; weights are random. Each step starts from where float64 arrived
(*teacher-forced*), so a row says what one forward does and not what a chain of them makes of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import platform
import sys
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from helios.model import presets
from helios.precision import PRECISIONS
from helios_conformance.draws import Root
from helios_conformance.golden import golden, reference
from helios_conformance.scenes.trajectory import Trajectory

STEPS = (2, 2, 2)


@dataclasses.dataclass(frozen=True, slots=True)
class Accuracy:
    """Of one velocity: ‖y − o‖ / ‖o‖; cos(y, o); PSNR in dB, whose peak is the oracle's range."""

    error: float
    cosine: float
    psnr: float


def accuracy(came: Tensor, right: Tensor) -> Accuracy:
    """Of a velocity against the oracle's, both host, any shape; computed in float64."""
    y, o = came.double().flatten(), right.double().flatten()
    error = float((y - o).norm() / o.norm())
    cosine = float(y @ o / (y.norm() * o.norm()))
    peak, rmse = float(o.max() - o.min()), float((y - o).square().mean().sqrt())
    return Accuracy(error, cosine, 20 * math.log10(peak / rmse) if rmse else math.inf)


def steps(scene: Trajectory, precision: str, root: Root) -> Mapping[str, Accuracy]:
    """By call, of the forwards alone."""
    right = golden(scene, root, PRECISIONS[precision].dtype).outputs
    came = reference(scene, root, precision)
    return {name.removesuffix(".velocity"): accuracy(came[name], right[name]) for name in _velocities(right)}


def _velocities(names: Mapping[str, Tensor]) -> Iterator[str]:
    return (name for name in names if name.endswith(".velocity") and ".guide" not in name)


def scene_of(layers: int, height: int, width: int) -> Trajectory:
    """One chunk of the distilled variant."""
    config = dataclasses.replace(presets.size("mini").transformer, num_layers=layers)
    return Trajectory("precision", config, "distilled", height, width, STEPS, tokens=64)


def table(scene: Trajectory, names: list[str], seeds: int) -> Iterator[str]:
    """Lines of Markdown: a row a step, of several draws the worst."""
    found = {name: [steps(scene, name, Root(seed)) for seed in range(seeds)] for name in names}
    rows = list(found[names[0]][0])
    yield "| step | " + " | ".join(names) + " |"
    yield "| --- |" + " --- |" * len(names)
    for row in rows:
        yield f"| {row} | " + " | ".join(_cell([draw[row] for draw in found[name]]) for name in names) + " |"


def _cell(draws: list[Accuracy]) -> str:
    error, cosine = max(d.error for d in draws), min(d.cosine for d in draws)
    return f"{error:.2e}, {1 - cosine:.1e}, {min(d.psnr for d in draws):.1f} dB"


def main(words: list[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--height", type=int, default=16, help="of the latents")
    parser.add_argument("--width", type=int, default=24, help="of the latents")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    asked = parser.parse_args(words)
    names = asked.precision or ["bf16", "fp16", "fp8-weights", "fp8", "fp8-attention"]
    scene = scene_of(asked.layers, asked.height, asked.width)
    out = sys.stdout.write
    size = f"{asked.layers} blocks, latents {asked.height}×{asked.width}"
    out(f"{platform.machine()}, torch {torch.__version__}; {size}, {asked.seeds} draws; ")
    out("‖y − o‖ / ‖o‖, 1 − cosine, PSNR: of the worst draw\n\n")
    out("\n".join(table(scene, names, asked.seeds)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
