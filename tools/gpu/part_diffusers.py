"""The same work by diffusers on the same device: Helios' pyramid at [1, 1, 1], eager, then compiled.

    tools/on_gpu.sh diffusers [--size 14b|mini|tiny] [--device cpu --tiny] [--budget SECONDS] [--out FOLDER]

The same networks with random weights of the same distributions, the transformer in bf16 and the VAE in float32 as
published, a prompt's embedding given, no guidance, no amplified first chunk. Compared with what *realtime* measured in
this folder, if it did.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import running
import torch
from environment import header
from results import Clock, Item, NotThereError, Record
from rig import Rig

from helios.model import presets
from helios.model.presets import SIZES
from helios.model.random_weights import spread

PART = "diffusers"
WANTED = "0.42"
STEPS = [1, 1, 1]
FRAMES = 33
"""Of a chunk."""
GAMMA = 0.33
"""In place of a third, where the covariance is singular and diffusers' factorisation gives up on some devices."""


def main(argv: list[str] | None = None) -> int:
    """Measure; the exit codes of ``running.run``."""
    options = running.parser(PART, "The same work by diffusers.")
    options.add_argument("--size", choices=("14b", "mini", "tiny"), default=None, help="14b, with --tiny tiny")
    args = options.parse_args(argv)
    clock = Clock(args.budget)
    rig = Rig.on(args.device, args.tiny)
    return running.run(PART, args, clock, lambda _: _items(rig, args, clock), functools.partial(report, args.out))


def _items(rig: Rig, args: argparse.Namespace, clock: Clock) -> Iterator[Item]:
    size = args.size or ("tiny" if args.tiny else "14b")
    theirs = Theirs(rig, size)
    need = 1.0 if args.tiny else 90.0
    for column in ("eager", "compiled"):
        take = functools.partial(_take, theirs, clock, compiled=column == "compiled")
        yield Item(f"film/{size}/{column}", f"a video at {STEPS}", size, column, take, need)


class Theirs:
    """The pipeline of diffusers with drawn weights, made when first used.

    Args:
        rig: the device.
        size: of the networks.
    """

    def __init__(self, rig: Rig, size: str) -> None:
        self.rig, self.size = rig, size
        self.shape = (64, 64, 16) if rig.tiny else (384, 640, 512)

    @functools.cached_property
    def pipeline(self) -> Any:
        """Raises NotThereError where diffusers, or what it needs, is not there."""
        try:
            import diffusers
            from diffusers import AutoencoderKLWan, HeliosDMDScheduler, HeliosPyramidPipeline, HeliosTransformer3DModel
        except (ImportError, RuntimeError) as error:  # a class whose own imports fail is a RuntimeError there
            raise NotThereError(f"diffusers cannot be imported: {str(error).strip().splitlines()[0]}") from error
        if not diffusers.__version__.startswith(f"{WANTED}."):
            raise NotThereError(f"diffusers {diffusers.__version__} is there, {WANTED} is what is compared with")
        networks, variant = SIZES[self.size], presets.variant("distilled")
        with torch.device("meta"):
            transformer = HeliosTransformer3DModel(**_fields(networks.transformer))
            vae = AutoencoderKLWan(**_fields(networks.vae))
        # What is no weight but computed when a network is made: one of a single block has it, too.
        shallow = HeliosTransformer3DModel(**{**_fields(networks.transformer), "num_layers": 1})
        keep = HeliosTransformer3DModel._keep_in_fp32_modules
        _fill(transformer, self.rig.device, torch.bfloat16, keep, dict(shallow.named_buffers()))
        _fill(vae, self.rig.device, torch.float32, (), {})
        scheduler = HeliosDMDScheduler(**{**_fields(variant.scheduler), "gamma": GAMMA})
        made = HeliosPyramidPipeline(None, None, vae, scheduler, transformer, is_distilled=True)
        made.set_progress_bar_config(disable=True)
        return made

    def compile(self) -> None:
        """torch.compile of the repeated blocks, which are nearly all of the time."""
        self.pipeline.transformer.compile_repeated_blocks(fullgraph=False, dynamic=False)

    def film(self, chunks: int) -> tuple[float, Any]:
        """Seconds of a video whose frames are on the host, and the frames."""
        height, width, tokens = self.shape
        width_of_text = SIZES[self.size].transformer.text_dim
        draw = torch.Generator(self.rig.device).manual_seed(1)
        embeds = torch.randn(1, tokens, width_of_text, device=self.rig.device, generator=draw, dtype=torch.float32)
        begin = time.perf_counter()
        frames = self.pipeline(
            prompt_embeds=embeds.to(torch.bfloat16),
            height=height,
            width=width,
            num_frames=FRAMES * chunks,
            guidance_scale=1.0,
            pyramid_num_inference_steps_list=STEPS,
            is_amplify_first_chunk=False,
            generator=draw,
            output_type="np",
        ).frames
        if self.rig.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin, frames


def _fields(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if not name.startswith("_")}


def _fill(
    model: torch.nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    keep: Sequence[str],
    buffers: Mapping[str, torch.Tensor],
) -> None:
    """Weights drawn on the device, tensor by tensor; ``keep`` names modules that stay in float32."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for own, parameter in list(module.named_parameters(recurse=False)):
            parts = f"{prefix}{own}".split(".")
            kind = torch.float32 if any(part in parts for part in keep) else dtype
            mean, deviation = spread(prefix + own, tuple(parameter.shape))
            drawn = torch.randn(parameter.shape, device=device).mul_(deviation).add_(mean).to(kind)
            setattr(module, own, torch.nn.Parameter(drawn, requires_grad=False))
        for own, _ in list(module.named_buffers(recurse=False)):
            if prefix + own not in buffers:
                raise NotThereError(f"this diffusers has a buffer {prefix}{own}, whose values nobody knows here")
            module._buffers[own] = buffers[prefix + own].to(device)
    model.eval()


def _take(theirs: Theirs, clock: Clock, *, compiled: bool) -> Record:
    """A short and a long video: what the long one takes more, by chunk, is a steady chunk with its decoding.

    The pipeline gives nothing before its last frame, so there is no other way to its steady chunks.
    """
    if compiled and not theirs.rig.cuda:
        raise NotThereError("compiled code of a CPU is no measure of this")
    _ = theirs.pipeline
    if compiled:
        theirs.compile()
    begin = time.perf_counter()
    warm, frames = theirs.film(1)
    short, long, most = (1, 2, 1) if theirs.rig.tiny else (1, 5, 3)
    pairs: list[tuple[float, float]] = []
    while not pairs or (len(pairs) < most and clock.left() > 1.5 * sum(pairs[-1])):
        pairs.append((theirs.film(short)[0], theirs.film(long)[0]))
    steady = [(b - a) / (long - short) for a, b in pairs]
    seconds = statistics.median(steady)
    record: Record = {"ms_median": 1e3 * seconds, "fps": FRAMES / seconds, "pairs": pairs, "chunks": [short, long]}
    record |= {"first_s": statistics.median(a for a, _ in pairs), "warm_s": warm, "steps": STEPS}
    record["device"] = header(PART, theirs.rig.device.type, theirs.rig.tiny)["device"]
    record |= {"seconds": time.perf_counter() - begin, "correct": bool(torch.isfinite(torch.as_tensor(frames)).all())}
    return record | ({"peak_allocated": torch.cuda.max_memory_allocated()} if theirs.rig.cuda else {})


def report(out: Path, records: Sequence[Record]) -> Iterator[str]:
    """Their frames a second, and ours over theirs where both were measured here."""
    for r in records:
        if r["status"] == "measured":
            told = f"diffusers {r['column']}, {r['row']} {r['steps']}: {r['fps']:.2f} FPS steady"
            yield f"{told}, {r['ms_median']:.0f} ms a chunk, first video of one chunk {r['first_s']:.2f} s"
            ours = _ours(out, r["row"], r["device"])
            if ours is not None:
                fps, vae = ours
                told = f"VAE in {vae}, theirs in fp32"
                yield f"   ours in this folder, {told}: {fps:.2f} FPS, {fps / r['fps']:.2f} times as fast"


def _ours(out: Path, size: str, device: str) -> tuple[float, str] | None:
    """Frames a second of *realtime* at the same steps, size and device, and in what its VAE decoded; the last that
    stands in its log."""
    log, here, found = out / "realtime.jsonl", False, None
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        entry = json.loads(line)
        if "header" in entry:
            here = entry["header"]["device"] == device
        elif here and entry.get("status") == "measured" and entry.get("steps") == STEPS and entry["row"] == size:
            found = float(entry["fps"]), str(entry.get("vae", "fp32"))
    return found


if __name__ == "__main__":
    sys.exit(main())
