"""How good frames are that the VAE decodes in 16 bits, with random weights: PSNR against float64.

    python tools/vae_psnr.py [--size mini --size 14b] [--height 64 --width 64] [--latents 9] [--draws 3]

Every operation is computed in float64 and its result rounded once to the dtype, weights too: what a right backend errs,
whichever device it is, and no product of 16 bits runs on this machine. ``cpu`` beside it are the CPU backend's kernels.
PSNR is 10·log10(255² / mean squared difference), of frames in whole levels, which are what is seen, and of frames
before they are made whole.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
import time

import torch
from torch import Tensor

from helios.backend import select
from helios.media import to_frames
from helios.model import presets
from helios.model.random_weights import RandomWeights
from helios.model.shapes import vae_shapes
from helios.model.vae_precision import VAE_DTYPES
from helios.model.vae_split import Split
from helios.pipeline.codec import Codec
from helios_conformance.frames import decode_rounded, levels, right_frames


def main() -> int:
    """Print a line for each size and arithmetic."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", action="append", choices=tuple(presets.SIZES), help="mini and 14b unless given")
    for name, default in (("height", 64), ("width", 64), ("latents", 9), ("draws", 3)):
        options.add_argument(f"--{name}", type=int, default=default)
    args = options.parse_args()
    torch.set_num_threads(1)
    say(f"{platform.machine()}, torch {torch.__version__}, random weights, standard normal latents")
    for size in args.size or ("mini", "14b"):
        rows = [measure(size, args.height, args.width, args.latents, draw) for draw in range(args.draws)]
        for way in rows[0]:
            whole, before = zip(*(row[way] for row in rows), strict=True)
            picture = f"{args.latents} latents of {args.width}×{args.height}, {args.draws} draws"
            say(f"{size:5} {way:8} whole levels {_range(whole)} dB, before {_range(before)} dB; {picture}")
    return 0


def measure(size: str, height: int, width: int, latents: int, draw: int) -> dict[str, tuple[float, float]]:
    """By arithmetic the PSNR in whole levels and before."""
    begin, config = time.perf_counter(), presets.size(size).vae
    weights, split = RandomWeights(vae_shapes(config), seed=draw), Split(latents)
    generator = torch.Generator().manual_seed(draw)
    x = torch.randn(1, config.z_dim, latents, height // 8, width // 8, generator=generator)
    exact = right_frames(config, weights, x, split, "fp32").exact
    videos = {name: decode_rounded(config, weights, x, split, VAE_DTYPES[name]) for name in ("bf16", "fp16")}
    videos["cpu bf16"] = Codec(config, weights, select("cpu"), torch.bfloat16).decode(x, split)
    videos["cpu fp32"] = Codec(config, weights, select("cpu"), torch.float32).decode(x, split)
    found = {name: _both(video, exact) for name, video in videos.items()}
    sys.stderr.write(
        f"{size} draw {draw}: {time.perf_counter() - begin:.0f} s, levels {exact.std():.0f} around the mean\n"
    )
    return found


def _both(video: Tensor, exact: Tensor) -> tuple[float, float]:
    return psnr(to_frames(video).double(), exact.round()), psnr(levels(video.double()), exact)


def psnr(frames: Tensor, right: Tensor) -> float:
    """In dB; infinite where they are equal."""
    error = float((frames - right).square().mean())
    return 10 * math.log10(255.0**2 / error) if error else math.inf


def _range(values: tuple[float, ...]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def say(line: str) -> None:
    """To standard output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
