"""The timed network opened: one more graph with what lies inside a block beside the velocity, at any size.

After the clock has stopped, stage, block and head are drawn from the digest of the run's last latents. The graph of
that stage is built again with seven more outputs and lowered on the same backend with the same weights. Its velocity
must be the timed program's own on the same inputs; and from each output to the next, float64 says what has to come
(*teacher forced*), on rows that the outputs' own digests draw. So no host has to compute 40 blocks of 11,040 tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from helios import op
from helios.graph import Graph, Rate, Value
from helios.model import presets
from helios.precision import DTYPES, PRECISIONS
from helios_conformance import budget, selection
from helios_conformance.budget import Errors
from helios_conformance.case import Case, Judged, Kept, Observation
from helios_conformance.draws import Root
from helios_conformance.graph_runs import largest
from helios_conformance.realtime import golden, inside
from helios_conformance.realtime.inside import ROLES, Pick, Rows
from helios_conformance.realtime.options import Options
from helios_conformance.realtime.scene import Scene, drawn_model
from helios_conformance.references import References
from helios_conformance.session import Session

__all__ = ["LABEL", "graph_with", "judge", "observe", "pick", "reference", "stages"]

LABEL = "opened"

SIZES = {"tiny": 32, "mini": 4, "14b": 1}
"""Sizes whose reference errors are committed, measured at 64×64 pixels with two layers, the last and another one; and
of how many draws they are the largest."""

MOST_FLOPS, MOST_BYTES = 2e12, 16 << 30
"""Of what the oracle computes beside the kept rows. At 14B and 384×640 it is a tenth of both."""

_HEADS = ("keys", "values")
"""Of these the drawn head is kept whole beside the rows: a row of attention reads all of it."""


def stages(options: Options, variant: str) -> list[int]:
    """Stages whose oracle the suite has references for and may be asked to compute, told from shapes alone."""
    return list(_stages(options.size, options.height, options.width, options.tokens, variant))


@functools.lru_cache(maxsize=32)
def _stages(size: str, height: int, width: int, tokens: int, variant: str) -> tuple[int, ...]:
    if size not in SIZES:
        return ()
    options = Options(size=size, height=height, width=width, tokens=tokens)
    made = golden.graphs_of(options, variant, torch.float64)
    cuts = [inside.constants(graph, 0) for graph in made.values()]
    flops = [sum(op.cost(node).flops for node in cut.nodes) for cut in cuts]
    held = [sum(v.type.nbytes for node in cut.nodes for v in node.outputs) for cut in cuts]
    return tuple(i for i in range(len(cuts)) if flops[i] <= MOST_FLOPS and held[i] <= MOST_BYTES)


def pick(root: Root, case: Case, options: Options, last: str) -> Pick | None:
    """What is opened, from the digest of the last latents, which nobody knew before the run was over."""
    found = stages(options, case.params["variant"])
    if not found:
        return None
    key, config = root.key("opened", case.id, last), presets.size(options.size).transformer
    block, head = (key >> 32) % config.num_layers, (key >> 64) % config.num_attention_heads
    return Pick(found[key % len(found)], block, head, Root(root.seed, f"{root.nonce} {last}"))


def graph_with(graph: Graph, block: int) -> tuple[Graph, dict[str, str]]:
    """The graph with the values of a block among its outputs, and the output's name of each of ``ROLES``: one value may
    have two roles, and is one output."""
    names: dict[str, str] = {}
    by_value = {value.name: name for name, value in graph.outputs}
    more: list[tuple[str, Value]] = []
    for role, value in inside.values(graph, block).items():
        if value.name not in by_value:
            by_value[value.name] = role
            more.append((role, value))
        names[role] = by_value[value.name]
    return dataclasses.replace(graph, outputs=graph.outputs + tuple(more)), names


def observe(case: Case, session: Session, scene: Scene, last: str) -> tuple[dict[str, Kept], dict[str, Any] | None]:
    """What is kept, and the fact ``opened``; nothing of a size without references, or with weights of a checkpoint.

    The timed program is freed before the other is made: 14B twice is more than a device may have.
    """
    chosen = pick(session.root, case, scene.options, last) if scene.origin == "random" else None
    if chosen is None:
        return {}, None
    name = f"denoise.{chosen.stage}"
    graph = golden.graphs_of(scene.options, case.params["variant"], PRECISIONS[case.precision])[name]
    timed = _velocity_of_the_timed(case, session, scene, chosen, name)
    scene.pipeline.release()
    gc.collect()
    wider, names = graph_with(graph, chosen.block)
    program = session.lower({name: wider})
    program.load(scene.pipeline.model.transformer_weights)
    made = golden.outputs_of(program, {name: wider}, name, chosen.root)
    host = {role: session.to_host(made[names[role]]) for role in ROLES}
    kept = _kept(session.root, case, host, chosen)
    told = {"stage": chosen.stage, "block": chosen.block, "head": chosen.head, "timed": selection.digest(timed)}
    difference = float((host["velocity"].double() - timed.double()).norm() / timed.double().norm().clamp_min(1e-30))
    told["difference"] = difference if math.isfinite(difference) else None
    return kept, told | {"engine": session.is_engine(program)}


def _velocity_of_the_timed(case: Case, session: Session, scene: Scene, chosen: Pick, name: str) -> Tensor:
    program = scene.pipeline.denoiser(scene.request("golden", 0, case.params["steps"])).program
    graphs = golden.graphs_of(scene.options, case.params["variant"], PRECISIONS[case.precision])
    return session.to_host(golden.forward(program, {name: graphs[name]}, [name], chosen.root)[name])


def _kept(root: Root, case: Case, host: Mapping[str, Tensor], chosen: Pick) -> dict[str, Kept]:
    digests = {role: selection.digest(tensor) for role, tensor in host.items()}
    rows = Rows.of(root.key("opened rows", case.id, *digests.values()), _shapes(host), chosen)
    kept = {}
    for role, tensor in host.items():
        values = rows.take(role, tensor).contiguous().reshape(-1)
        finite = selection.all_finite(tensor)
        kept[f"{LABEL}.{role}"] = Kept(values, tuple(tensor.shape), _named(tensor), digests[role], finite)
    for role in _HEADS:
        kept[f"{LABEL}.{role}.head"] = _whole(host[role][:, :, chosen.head].contiguous())
    return kept


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {role: tuple(tensor.shape) for role, tensor in tensors.items()}


def _named(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _whole(tensor: Tensor) -> Kept:
    told = selection.digest(tensor)
    return Kept(tensor.reshape(-1), tuple(tensor.shape), _named(tensor), told, selection.all_finite(tensor))


def judge(
    case: Case, observation: Observation, setting: Mapping[str, Any], root: Root, references: References
) -> tuple[dict[str, Judged], list[str]]:
    """Judge what was kept. What has to be there follows from the setting and the run's last latents."""
    options, last = Options.of(setting), str(observation.facts["chunks"][-1]["latents"])
    chosen = pick(root, case, options, last) if setting["weights"] == "random" else None
    if chosen is None:
        return {}, []
    known = {role: references.get(_home(case), f"{options.size}.{role}") for role in inside.JUDGED}  # before any work
    told = observation.facts["opened"]
    if told is None or [told[k] for k in ("stage", "block", "head")] != [chosen.stage, chosen.block, chosen.head]:
        return {}, [f"opened: wanted stage {chosen.stage}, block {chosen.block}, head {chosen.head}; it was not done"]
    graph = golden.graphs_of(options, setting["variant"], torch.float64)[f"denoise.{chosen.stage}"]
    seen = _read(case, observation, graph, chosen, root)
    if isinstance(seen, str):
        return {}, [seen]
    reasons = _same_velocity(case, observation, options, references, chosen)
    weights = drawn_model(options.size, setting["variant"], root).transformer_weights
    working = golden.graphs_of(options, setting["variant"], PRECISIONS[case.precision])[graph.name]
    found = inside.measure(graph, presets.size(options.size).transformer, weights, given(working, chosen.root), *seen)
    judged = {}
    for role, errors in found.items():
        terms = presets.size(options.size).transformer.ffn_dim
        allowed = budget.bounds("fused", DTYPES[case.precision], terms, errors.count, known[role])
        judged[f"{LABEL}.{role}"] = Judged(errors, allowed, known[role])
        where = f"stage {chosen.stage}, block {chosen.block}: {role}"
        reasons += [f"opened, {where}: {line}" for line in budget.exceeded(errors, allowed)]
    return judged, reasons


def given(graph: Graph, root: Root) -> dict[str, Tensor]:
    """All drawn inputs of a graph but the weights, host."""
    graphs = {graph.name: graph}
    bound = golden.contexts(graphs, root)
    return {**bound[Rate.PROMPT], **bound[Rate.CHUNK], **golden.draw(graphs, Rate.STEP, root)}


def _read(
    case: Case, observation: Observation, graph: Graph, chosen: Pick, root: Root
) -> tuple[Pick, Rows, dict[str, Tensor], dict[str, Tensor]] | str:
    """Rows and heads as matrices, or what is wrong with them."""
    dtype = str(DTYPES[case.precision]).removeprefix("torch.")
    shapes = {role: value.shape for role, value in inside.values(graph, chosen.block).items()}
    kept = {role: observation.outputs.get(f"{LABEL}.{role}") for role in ROLES}
    heads = {role: observation.outputs.get(f"{LABEL}.{role}.head") for role in _HEADS}
    for role, one in [*kept.items(), *heads.items()]:
        if one is None or one.dtype != dtype or not one.finite:
            return f"opened: {role} is missing, not finite, or not {dtype}"
    whole_shapes = {role: (1, *shapes[role][1::2]) for role in _HEADS}
    for role, one, wanted in [(r, kept[r], shapes[r]) for r in ROLES] + [
        (r, heads[r], whole_shapes[r]) for r in _HEADS
    ]:
        if one is not None and one.shape != wanted:
            return f"opened: {role} has the shape {list(one.shape)}, wanted {list(wanted)}"
    rows = Rows.of(root.key("opened rows", case.id, *(k.digest for k in kept.values() if k)), shapes, chosen)
    sizes = {role: (rows.count(role), _width(role, shapes[role])) for role in ROLES}
    read, whole = _matrices(kept, sizes), _matrices(heads, {r: shape[1:] for r, shape in whole_shapes.items()})
    if isinstance(read, str) or isinstance(whole, str):
        return read if isinstance(read, str) else str(whole)
    for role in _HEADS:  # rows and head are of one tensor
        width = whole[role].shape[1]
        part = read[role][:, chosen.head * width : (chosen.head + 1) * width]
        if not torch.equal(part, whole[role][rows.of_role(role)]):
            return f"opened: rows and head of {role} are not of one tensor"
    return chosen, rows, read, whole


def _width(role: str, shape: tuple[int, ...]) -> int:
    """Elements of a row: of a token."""
    return 4 * shape[1] if role == "velocity" else math.prod(shape[2:])


def _matrices(kept: Mapping[str, Kept | None], sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | str:
    made = {}
    for role, one in kept.items():
        if one is None or one.values.numel() != math.prod(sizes[role]):
            return f"opened: of {role} other elements are kept than the digests choose"
        made[role] = one.values.reshape(sizes[role])
    return made


def _same_velocity(
    case: Case, observation: Observation, options: Options, references: References, chosen: Pick
) -> list[str]:
    """Kernels give the same bits: more outputs change no node. An engine may fuse otherwise around them, so two right
    results may differ there: by three times the reference's error of mini, grown with the root of the depth."""
    told = observation.facts["opened"]
    if told["timed"] == observation.outputs[f"{LABEL}.velocity"].digest:
        return []
    if not told["engine"]:
        return ["opened: the velocity is not the timed program's own on the same inputs"]
    config, mini = presets.size(options.size).transformer, presets.size("mini").transformer
    known = references.get(_home(case), f"mini.denoise.{chosen.stage}")
    allowed = 3 * known.norm * math.sqrt(max(1.0, config.num_layers / mini.num_layers))
    if told["difference"] is not None and told["difference"] <= allowed:
        return []
    return [f"opened: the velocity differs from the timed program's by {told['difference']}, beyond {allowed:.3g}"]


def _home(case: Case) -> str:
    return f"realtime[{case.precision},distilled,1-1-1]"


def reference(case: Case, root: Root) -> dict[str, Errors]:
    """Errors of the op bodies in the working dtype, by ``size.role``: the largest over stages, of the last block and
    of another one."""
    rows: dict[str, list[Errors]] = {}
    for size, draws in SIZES.items():
        for draw in range(draws):
            one = Root(64 * root.seed + draw, root.nonce)
            for role, errors in _reference(size, case, one):
                rows.setdefault(f"{size}.{role}", []).append(errors)
    return {name: largest(errors) for name, errors in rows.items()}


def _reference(size: str, case: Case, root: Root) -> Iterator[tuple[str, Errors]]:
    config = dataclasses.replace(presets.size(size).transformer, num_layers=2)
    weights = inside.Remembered(drawn_model(size, case.params["variant"], root).transformer_weights)
    for stage, block in itertools.product((0, 2), (0, 1)):
        yield from inside.reference_errors(config, case.precision, weights, Pick(stage, block, 1, root)).items()
