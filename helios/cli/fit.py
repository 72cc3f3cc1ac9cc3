"""``helios fit``: whether a setting fits a device, and how fast it may be there."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helios.cli import output
from helios.cli.options import (
    HeightOption,
    JsonOption,
    NamedPrecisionOption,
    SizeOption,
    StepsOption,
    VaePrecisionOption,
    VariantOption,
    WidthOption,
    setting,
)
from helios.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from helios.fit.devices import Device
    from helios.fit.estimate import Fit, Speed, Work
    from helios.fit.host import Host
    from helios.fit.low import Low

__all__ = ["EXAMPLES", "Target", "fit", "this_machine"]

EXAMPLES = "Example: helios fit --device h100 --variant distilled --steps 1,1,1"


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What the question is about.

    Attributes:
        title: for people.
        backend: as it would be selected.
        memory: bytes of the device, or of the host where both are one.
        peak: FLOP a second in the asked precision; 0 where unknown.
        bandwidth: bytes a second; 0 where unknown.
        source: where the figures come from.
        shared: whether device and host memory are one.
        here: whether it is this machine.
        device: the row of the table, if it has one.
        fp8: whether it multiplies e4m3 numbers; None where nothing is known of it.
        instead: the precision to take where it does not.
        offers: the precisions of the backend that would run here; empty where that is not known.
    """

    title: str
    backend: str
    memory: int
    peak: float
    bandwidth: float
    source: str
    shared: bool = False
    here: bool = False
    device: Device | None = None
    fp8: bool | None = None
    instead: str = "fp8-weights"
    offers: tuple[str, ...] = ()


def fit(
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Such as h100, rtx4090 or ascend-910b.", show_default="this machine"),
    ] = None,
    size: SizeOption = "14b",
    variant: VariantOption = "distilled",
    height: HeightOption = 384,
    width: WidthOption = 640,
    precision: NamedPrecisionOption = "bf16",
    vae_precision: VaePrecisionOption = None,
    steps: StepsOption = None,
    json: JsonOption = False,
) -> None:
    """Predict whether a device is large enough, and its frames a second.

    Needs no accelerator: everything is computed from shapes and from a table of devices.
    """
    from helios.fit import devices

    row = devices.find(device) if device is not None else None  # a wrong name should not wait for torch
    from helios.fit.estimate import count_work, fit_memory, parse_steps, predict, repository
    from helios.fit.host import read_host
    from helios.model.vae_precision import vae_name

    asked = setting(size, variant, height, width, precision)
    taken = parse_steps(steps, asked.variant)
    host = read_host()
    target = from_table(row, precision) if row is not None else this_machine(host, precision)
    asked = dataclasses.replace(asked, decoding=decoding_of(target.backend, precision, vae_precision))
    work = count_work(asked)
    memory = fit_memory(work, target.memory, shared=target.shared)
    speed = predict(work, taken, peak=target.peak, bandwidth=target.bandwidth) if target.peak else None
    low = _with_low_memory(target, work, memory, taken)
    refused = refusal(target, precision)
    flags = [] if refused else suggested(target, work, memory if low is None else low.fit, taken, precision)
    flags += ["--memory", "low"] if flags and low is not None else []
    flags += ["--vae-precision", vae_precision] if flags and vae_precision is not None else []
    download = repository(asked)
    if json:
        data = _data(target, work, memory, speed, taken, host, dataclasses.asdict(download), flags)
        output.print_json(data | {"memory_low": None if low is None else _low_data(low), "refused": refused})
        return
    arithmetic = f"{precision}, VAE in {vae_name(asked.decoding)}"
    output.line(f"Helios {size}, {variant}, {height}×{width}, {arithmetic}, steps {','.join(map(str, taken))}")
    output.line(f"on {target.title} ({_figures(target)}; {target.source})")
    _print_memory(target, memory)
    if low is not None:
        _print_low(low)
    _print_host(target, memory if low is None else low.fit, host)
    _print_download(size, download, host)
    _print_speed(target, speed, memory, taken, work, precision)
    _print_flags(flags, memory, target, refused)


def decoding_of(spec: str, precision: str, asked: str | None) -> torch.dtype:
    """In what a backend's VAE decodes; of one that is not installed here nothing is known, and it is as published."""
    from helios import backend as backends
    from helios.model.vae_precision import VAE_DTYPES, choose_vae_precision

    try:
        cls = backends.load(backends.parse_spec(spec)[0])
    except BackendError:
        cls = backends.ReferenceBackend
    return VAE_DTYPES[choose_vae_precision(asked, precision, cls)]


def _with_low_memory(target: Target, work: Work, memory: Fit, steps: tuple[int, ...]) -> Low | None:
    """How it would be with ``--memory low``, where the backend has that and it is needed."""
    from helios.fit.low import fit_low, offers_low

    if memory.fits or target.shared or not offers_low(target.backend):
        return None
    forwards = sum(steps) * (2 if work.setting.variant.guidance > 1 else 1)
    return fit_low(work, target.memory, forwards, target.device.pcie if target.device else 0)


def _low_data(low: Low) -> dict[str, Any]:
    names = ("resident", "fetched", "seconds", "fps")
    return {
        "label": "prediction",
        "fits": low.fit.fits,
        "short": low.fit.short,
        **{name: getattr(low, name) for name in names},
    }


def _print_low(low: Low) -> None:
    output.heading("With --memory low: a prediction, not a measurement")
    short = f"does NOT fit either: {output.gigabytes(low.fit.short)} are missing"
    output.line("fits; weights without room stay on the host" if low.fit.fits else short)
    kept, fetched = output.gigabytes(low.resident), output.gigabytes(low.fetched)
    output.line(f"{kept} of the weights stay on the device, {fetched} cross the bus in each forward.")
    if low.fps:
        seconds = output.seconds(low.seconds)
        output.line(f"That takes {seconds} a forward: at most {low.fps:.3g} frames a second, were all else free.")


def from_table(device: Device, precision: str) -> Target:
    """A device of the table. Its peak is known in bfloat16 alone."""
    peak = device.peak if precision == "bf16" else 0.0
    figures = (device.title, device.backend, device.memory, peak, device.bandwidth, device.source)
    return Target(*figures, device=device, fp8=device.fp8)


def this_machine(host: Host, precision: str) -> Target:
    """What Helios would run on here: a device that the table knows, or the host with its measured matrix product."""
    from helios.backend import select
    from helios.fit.devices import recognise
    from helios.fit.measure import matrix_rate
    from helios.precision import precision as precision_of

    backend = select()
    info = next(d for d in backend.devices() if d.index == backend.index)
    known = recognise(info.name)
    if backend.device.type == "cpu":
        asked = precision_of(precision)
        # Nothing is measured of quantised products, and float16 is multiplied number by number on most hosts.
        measured = precision in backend.precisions and not asked.quantised
        rate = matrix_rate(asked.dtype) if measured else 0.0
        source = "peak: a matrix product, measured now beside whatever else runs" if rate else "peak: not measured"
        title = f"this machine: {host.cpu}, {host.usable_cores:g} cores"
        found = Target(title, backend.label, host.usable_memory, rate, 0.0, source, shared=True, here=True, fp8=False)
        # A backend for CPUs may hold no quantised weights either.
        instead = found.instead if found.instead in backend.precisions else backend.precisions[0]
        return dataclasses.replace(found, instead=instead, offers=tuple(backend.precisions))
    if known is not None:
        found = from_table(known, precision)
        memory = info.memory or known.memory
        return dataclasses.replace(found, title=info.name, backend=backend.label, memory=memory, here=True)
    source = "the table has no row for it, so no speed is predicted"
    return Target(info.name, backend.label, info.memory or 0, 0.0, 0.0, source, here=True)


def suggested(target: Target, work: Work, memory: Fit, steps: tuple[int, ...], precision: str) -> list[str]:
    """Flags of ``helios generate`` for this setting; none if it does not fit."""
    if not memory.fits:
        return []
    asked = work.setting
    model = ["--model", "PATH_OR_REPO"] if asked.size.name == "14b" else ["--size", asked.size.name]
    flags = [*model, "--variant", asked.variant.name, "--height", str(asked.height), "--width", str(asked.width)]
    flags += ["--backend", target.backend, "--precision", precision]
    return flags + ["--steps", ",".join(map(str, steps))]


def refusal(target: Target, precision: str) -> dict[str, str] | None:
    """``why`` a precision cannot be had there, and the ``fix``; None where it can, or where nothing is known."""
    from helios.precision import precision as precision_of

    if precision_of(precision).products == "e4m3" and target.fp8 is False:
        name = "this machine's CPU" if target.shared else target.title
        return {"why": f"{name} multiplies no e4m3 numbers", "fix": f"--precision {target.instead}"}
    if target.offers and precision not in target.offers:
        return {
            "why": f"backend {target.backend!r} does not compute in {precision}",
            "fix": f"--precision {target.instead}",
        }
    return None


def _figures(target: Target) -> str:
    parts = [f"{target.memory / 2**30:.0f} GiB"]
    if target.bandwidth:
        parts.append(f"{target.bandwidth / 1e9:.0f} GB/s")
    if target.peak:
        parts.append(f"{target.peak / 1e12:.3g} TFLOP/s")
    return ", ".join(parts)


def _print_memory(target: Target, memory: Fit) -> None:
    from helios.fit.estimate import MOMENTS

    output.heading("Memory of this machine" if target.shared else "Memory of the device")
    rows = [(p.name, *(_size(getattr(p, moment)) for moment in MOMENTS)) for p in memory.parts]
    rows.append(("together", *(_size(memory.at(moment)) for moment in MOMENTS)))
    columns = ["at a time", "encoding text", "a step", "decoding frames"]
    output.table(columns, rows, right=columns[1:])
    verdict = "fits" if memory.fits else f"does NOT fit: {output.gigabytes(memory.short)} are missing"
    output.line(f"{verdict}; {output.gigabytes(memory.usable)} can be used of {output.gigabytes(target.memory)}")
    if memory.apart:
        output.line("The prompt is encoded before the transformer is loaded: both have no room at once.")
    if memory.fits_without_text and not memory.fits:
        output.line("Only the text encoder has no room: in Python, prompt_embeds made elsewhere stand for a text.")
    if memory.split is not None and memory.split.tile is not None:
        tile = memory.split.tile.size
        output.line(f"The VAE has room for tiles of {tile}×{tile} pixels only; their seams are blended, not exact.")
    elif memory.split is None:
        output.line("The VAE has no room, not even for tiles: it takes at most half of what the others leave.")
    else:
        output.line(f"The VAE decodes {output.count(memory.split.group, 'latent')} at a time.")


def _size(size: int) -> str:
    return output.gigabytes(size) if size else ""


def _print_host(target: Target, memory: Fit, host: Host) -> None:
    limit = f", its cgroup allows {output.gigabytes(host.memory_limit)}" if host.memory_limit else ""
    here = f"this host has {output.gigabytes(host.memory)}{limit}, {output.gigabytes(host.available)} available now"
    if target.shared:
        output.line(f"{here[0].upper()}{here[1:]}.")
        return
    output.heading("Memory of the host")
    rows = [(name, output.gigabytes(size)) for name, size in memory.host]
    output.table(["part", "size"], [*rows, ("together", output.gigabytes(memory.host_total))], right=["size"])
    enough = "enough" if memory.host_total <= host.usable_memory else "NOT enough"
    output.line(f"{enough}: {here}")


def _print_download(size: str, download: Any, host: Host) -> None:
    output.heading("Download and disk")
    parts = f"transformer {output.gigabytes(download.transformer)}, text encoder {output.gigabytes(download.text)}"
    output.line(f"{output.gigabytes(download.total)}: {parts}, VAE {output.gigabytes(download.vae)}")
    enough = "enough" if download.total <= host.disk_free else "NOT enough"
    output.line(f"{enough}: {output.gigabytes(host.disk_free)} are free here, in {host.cache}")
    stored = "16-bit transformer and text encoder, 32-bit VAE"
    which = "a repository may hold more" if size == "14b" else f"no repository of size {size} is published"
    output.note(f"Computed from parameter counts ({stored}); {which}.")


def _print_speed(
    target: Target, speed: Speed | None, memory: Fit, steps: tuple[int, ...], work: Work, precision: str
) -> None:
    from helios.fit.estimate import SHARES, vae_shares

    output.heading("Speed: a prediction, not a measurement")
    if speed is None:
        why = f"no {precision} peak of it is known" if target.device else "its peak is not known"
        output.line(f"Not predicted: {why}.")
        return
    output.line(f"{_range(speed.fps)} frames a second, steady" + ("" if memory.fits else ", if it did fit"))
    output.table(
        ["part of a chunk", "TFLOP", "slow", "fast"],
        [
            (f"{speed.forwards} forwards", output.teraflops(speed.flops), *map(output.seconds, speed.denoise)),
            ("VAE decode", output.teraflops(work.vae_flops), *map(output.seconds, speed.vae)),
        ],
        right=["TFLOP", "slow", "fast"],
    )
    if speed.first_chunk != (speed.denoise[0] + speed.vae[0], speed.denoise[1] + speed.vae[1]):
        slow, fast = map(output.seconds, speed.first_chunk)
        output.line(f"The first chunk takes twice the steps: {fast} to {slow}.")
    shares = vae_shares(work.setting)
    output.note(
        f"Assumed: {SHARES[0]:.0%} to {SHARES[1]:.0%} of the peak in the transformer, {shares[0]:.0%} to "
        f"{shares[1]:.0%} in the VAE; text and video encoding left out."
    )
    for known in _published(target, work, steps):
        output.line(f"Published for this device and these steps: {known.fps:g} frames a second ({known.source}).")


def _published(target: Target, work: Work, steps: tuple[int, ...]) -> list[Any]:
    rows = target.device.published if target.device else ()
    asked = work.setting
    usual = asked.size.name == "14b" and (asked.height, asked.width) == (384, 640)
    return [row for row in rows if usual and row.variant == asked.variant.name and row.steps == steps]


def _range(pair: tuple[float, float]) -> str:
    return " to ".join(f"{value:.3g}" if value >= 0.01 else f"{value:.1g}" for value in pair)


def _print_flags(flags: list[str], memory: Fit, target: Target, refused: Mapping[str, str] | None) -> None:
    from helios.fit.devices import table

    output.heading("Suggested")
    if refused is not None:
        output.line(f"{refused['why'][0].upper()}{refused['why'][1:]}: {refused['fix']}.")
        return
    if flags:
        output.command(["helios", "generate", '"…"', *flags])
        return
    wanted = target.memory + memory.short
    room = sorted((d for d in table().values() if d.memory > wanted), key=lambda d: (d.memory, d.name))
    names = ", ".join(d.name for d in room[:4])
    smaller = "A smaller --height and --width, or more" if memory.at("encode") <= memory.usable else "More"
    output.line(f"{smaller} memory" + (f": {names} have enough." if names else "."))
    if target.shared:
        output.line("To see it run here: --size mini or --size tiny, with random weights.")


def _data(
    target: Target,
    work: Work,
    memory: Fit,
    speed: Speed | None,
    steps: tuple[int, ...],
    host: Host,
    download: dict[str, int],
    flags: list[str],
) -> dict[str, Any]:
    from helios.fit.estimate import MOMENTS
    from helios.model.vae_precision import vae_name

    asked = work.setting
    counts = {f.name: getattr(work, f.name) for f in dataclasses.fields(work) if f.name != "setting"}
    return {
        "label": "prediction",
        "size": asked.size.name,
        "variant": asked.variant.name,
        "height": asked.height,
        "width": asked.width,
        "precision": asked.precision.name,
        "vae_precision": vae_name(asked.decoding),
        "steps": steps,
        "target": {f.name: getattr(target, f.name) for f in dataclasses.fields(target) if f.name != "device"},
        "fits": memory.fits,
        "memory": dataclasses.asdict(memory)
        | {
            "moments": {moment: memory.at(moment) for moment in MOMENTS},
            "fits_without_text": memory.fits_without_text,
            "short": memory.short,
            "host_total": memory.host_total,
        },
        "download": download | {"total": sum(download.values()), "label": "computed from parameter counts"},
        "host": dataclasses.asdict(host),
        "work": counts,
        "speed": None if speed is None else dataclasses.asdict(speed),
        "published": [dataclasses.asdict(row) for row in _published(target, work, steps)],
        "flags": flags,
    }
