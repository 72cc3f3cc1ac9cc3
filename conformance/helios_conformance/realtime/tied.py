"""What ties a timed run to a right one: its chunks made again without the clock, and its program on drawn inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from helios.pipeline.run import Chunk
from helios.precision import PRECISIONS
from helios_conformance import budget, selection
from helios_conformance.budget import Errors
from helios_conformance.case import Case, Judged, Kept, Observation
from helios_conformance.draws import Root
from helios_conformance.graph_runs import largest, misshapen
from helios_conformance.realtime import golden, opened
from helios_conformance.realtime.film import Reel, settled
from helios_conformance.realtime.options import Options
from helios_conformance.realtime.scene import Scene
from helios_conformance.references import References
from helios_conformance.selection import Layout
from helios_conformance.session import Session

__all__ = ["again", "forwards", "judge_forwards", "picked", "reference"]

LAYOUT = Layout(row_dims=3)
"""Of a velocity ``[b, c, t, h, w]``: a row is a channel of a frame."""


def picked(root: Root, case: str, shots: Sequence[Mapping[str, Any]], kept: int) -> list[int]:
    """Chunks to make again: the first two, the last that was kept, and two drawn from the last chunk's digest, which
    nobody knew before the run was over."""
    count = min(len(shots), kept)
    key = root.key("checked", case, shots[-1]["latents"]) if shots else 0
    drawn = [(key >> (32 * i)) % count for i in range(2)] if count else []
    return sorted({i for i in (0, 1, count - 1, *drawn) if 0 <= i < count})


def again(
    scene: Scene, reel: Reel, prompt: str, seed: int, steps: Sequence[int], indices: Sequence[int]
) -> Iterator[tuple[list[Any], Chunk]]:
    """Chunks of a reel once more, from the states before them and without a clock: index and digests, and the chunk."""
    for i in indices:
        chunk = next(iter(scene.stream(prompt, seed, steps, i + 1, reel.states.get(i))))
        told = settled(chunk, scene.pipeline.backend)
        yield [i, told["frames"], told["latents"]], chunk


def forwards(case: Case, session: Session, scene: Scene) -> dict[str, Kept]:
    """What is kept of one drawn forward a stage through the very program that was timed, by ``size.entry``."""
    options, variant = scene.options, case.params["variant"]
    names = golden.entries(options, variant) if scene.origin == "random" else []
    if not names:
        return {}
    graphs = golden.graphs_of(options, variant, PRECISIONS[case.precision])
    program = scene.pipeline.denoiser(scene.request("golden", 0, case.params["steps"])).program
    made = golden.forward(program, {name: graphs[name] for name in graphs}, names, session.root)
    return {
        f"{options.size}.{name}": selection.keep(
            session.root, case.id, name, session.to_host(tensor), LAYOUT, share=len(names)
        )
        for name, tensor in made.items()
    }


def judge_forwards(
    case: Case, observation: Observation, setting: Mapping[str, Any], root: Root, references: References
) -> tuple[dict[str, Judged], list[str]]:
    """Judge them by the float64 oracle on this host. Which there have to be follows from the setting."""
    options = Options.of(setting)
    wanted = golden.entries(options, setting["variant"]) if setting["weights"] == "random" else []
    judged: dict[str, Judged] = {}
    missing = [n for n in wanted if f"{options.size}.{n}" not in observation.outputs]
    if missing:
        return judged, [f"no forward of {', '.join(missing)} was kept"]
    if not wanted:
        return judged, []
    # Looked up before any work: what the suite knows nothing of is not computed.
    all_known = {name: references.get(_home(case), f"{options.size}.{name}") for name in wanted}
    oracle = golden.oracle(options, setting["variant"], case.precision, wanted, root)
    graphs = golden.graphs_of(options, setting["variant"], PRECISIONS[case.precision])
    types = {name: dict(graphs[name].outputs)["velocity"].type for name in wanted}
    reasons = []
    for name in wanted:
        label = f"{options.size}.{name}"
        kept = observation.outputs[label]
        if wrong := misshapen(kept, types[name]):
            reasons.append(f"{label}: {wrong}")
            continue
        chosen = selection.selection(
            root, case.id, name, kept.shape, kept.values.dtype, kept.digest, LAYOUT, share=len(wanted)
        )
        right = chosen.take(selection.as_matrix(oracle[name], LAYOUT))
        if right.shape != kept.values.shape:
            reasons.append(f"{label}: {kept.values.numel()} elements are kept, its digest chooses {right.numel()}")
            continue
        errors = budget.measure(kept.values, right)
        known = all_known[name]
        allowed = budget.bounds("fused", kept.values.dtype, _terms(options), errors.count, known)
        judged[label] = Judged(errors, allowed, known)
        reasons += [f"{label}: {line}" for line in budget.exceeded(errors, allowed)]
    return judged, reasons


def _terms(options: Options) -> int:
    """Of the longest sum: the inner width of the feed-forward layer."""
    return golden.setting_of(options, "distilled").size.transformer.ffn_dim


def _home(case: Case) -> str:
    """The case whose reference errors serve all: a forward does not depend on how many of them make a chunk."""
    return f"realtime[{case.precision},distilled,1-1-1]"


def reference(case: Case, root: Root) -> dict[str, Errors]:
    """Errors of the op bodies in the working dtype, for the sizes that a host can compute, at 64×64 pixels."""
    if case.id != _home(case):
        return {}
    rows: dict[str, list[Errors]] = {}
    for size, draws in golden.SIZES.items():
        for draw in range(draws):
            for name, errors in _drawn_errors(size, case, Root(64 * root.seed + draw, root.nonce)).items():
                rows.setdefault(name, []).append(errors)
    return {name: largest(errors) for name, errors in rows.items()} | opened.reference(case, root)


def _drawn_errors(size: str, case: Case, root: Root) -> dict[str, Errors]:
    options, variant = Options(size=size, height=64, width=64), case.params["variant"]
    names = golden.entries(options, variant)
    right, came = (
        golden.oracle(options, variant, case.precision, names, root, arithmetic=arithmetic)
        for arithmetic in (None, PRECISIONS[case.precision])
    )
    return {f"{size}.{name}": budget.measure(came[name], right[name]) for name in names}
