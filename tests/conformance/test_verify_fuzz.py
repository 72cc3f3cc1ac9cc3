"""Edits of a valid bundle, drawn at random: what is accepted is no edit, or of a field that is listed as attested.

The forger here has no key but everything else: after each edit every conclusion, every derived file and every digest is
made anew, so that only what the verifier itself recomputes or cross-checks can refuse.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import realtime_report
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helios_conformance import checks, manifest, realtime, recheck, verify
from helios_conformance.references import committed

FUZZ = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])

JSON_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", "inf", "nan", "pass", "fail", "certified", "bf16", "fp32", "ops", "0" * 64, "𝓍\u202e\x00"]),
    st.text(max_size=20),
    st.just([]),
    st.just({}),
    st.just([[[]]]),
)


Path_ = tuple[Any, ...]


def paths(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, inner ones included."""
    if at:
        yield at
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths(value, (*at, key))


def put(tree: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def take(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def attested(path: tuple[Any, ...]) -> bool:
    """Whether a place, or one that holds it, is listed as attested."""
    dotted = ".".join("*" if isinstance(key, int) else str(key).replace(".", "_") for key in path)
    return any(fnmatch.fnmatchcase(dotted, p) or fnmatch.fnmatchcase(dotted, f"{p}.*") for p in verify.ATTESTED)


def tolerated(told: dict[str, Any], original: dict[str, Any], path: tuple[Any, ...]) -> bool:
    """Whether it is a statistic that was moved by no more than two hosts may differ."""
    if len(path) != 6 or path[0] != "cases" or path[4] not in ("errors", "bounds", "reference"):
        return False
    bound = take(original, (*path[:4], "bounds", path[5]))
    return recheck.near(path[5], take(told, path), take(original, path), bound)


DERIVED = ("weights", "coverage", "divergence", "realtime", "verdict", "tier", "not_proved", "reproduce")


REACHED = 0.5
"""Part of the edits that must reach the verifier at least, as a bundle whose files and digests are all right. Of the
others the forger's own tools make no bundle: what they raise on, the verifier never sees."""


@dataclasses.dataclass
class Tally:
    """Edits that were tried, and those that reached the verifier."""

    tried: int = 0
    reached: int = 0

    def forge(self, bundles: Any, told: dict[str, Any], folder: Path, *, derive: bool = True) -> bool:
        """Whether the forger's tools made a bundle of it."""
        self.tried += 1
        try:
            bundles.forge(told, folder, derive=derive)
        except Exception:
            return False
        self.reached += 1
        return True

    def settle(self) -> None:
        assert self.reached >= REACHED * self.tried, f"{self.reached} of {self.tried} edits reached the verifier"


def check(bundles: Any, told: dict[str, Any], folder: Path, tally: Tally, *, derive: bool = True) -> None:
    """What can be written and derived must be refused, unless all that is different is attested."""
    if not tally.forge(bundles, told, folder, derive=derive):
        return
    outcome = bundles.verify(folder)
    for finding in outcome.findings:
        assert str(finding).isprintable()
    if outcome.accepted:
        original = bundles.report()
        moved = [path for path in differing(told, original) if not (derive and path[0] in DERIVED)]
        wrong = [path for path in moved if not (attested(path) or tolerated(told, original, path))]
        assert not wrong, f"edits of {wrong} were accepted"


def differing(told: Any, original: Any, at: Path_ = ()) -> Iterator[Path_]:
    """The innermost places where two JSON values differ."""
    if isinstance(told, dict) and isinstance(original, dict) and set(told) == set(original):
        for key in told:
            yield from differing(told[key], original[key], (*at, key))
    elif isinstance(told, list) and isinstance(original, list) and len(told) == len(original):
        for i, (one, other) in enumerate(zip(told, original, strict=True)):
            yield from differing(one, other, (*at, i))
    elif json.dumps(told) != json.dumps(original):
        yield at


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


Fuzzed = Callable[[st.DataObject, Tally], None]


def fuzzed(body: Fuzzed, how: settings = FUZZ) -> None:
    """Run it on drawn edits; enough of them must reach the verifier."""
    tally = Tally()

    @how
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        body(data, tally)

    run()
    tally.settle()


def test_no_edit_of_the_report_is_accepted(closed: Any, scratch: Path) -> None:
    fuzzed(lambda data, tally: edit_anywhere(data, closed, scratch, tally))


@pytest.mark.slow
def test_no_edit_of_the_report_is_accepted_at_length(closed: Any, scratch: Path) -> None:
    how = settings(FUZZ, max_examples=2000)
    fuzzed(lambda data, tally: edit_anywhere(data, closed, scratch, tally), how)


def test_no_edits_in_several_places_are_accepted(closed: Any, scratch: Path) -> None:
    """One may not cover up for another."""
    fuzzed(lambda data, tally: edit_anywhere(data, closed, scratch, tally, most=4))


def edit_anywhere(
    data: st.DataObject, bundles: Any, scratch: Path, tally: Tally, *, most: int = 1, under: Path_ = ()
) -> None:
    """Some places of the report say something else, and all that follows from them is made anew."""
    told = bundles.report()
    places = [p for p in paths(told) if p[0] not in DERIVED and p[: len(under)] == under]
    edited = data.draw(st.lists(st.sampled_from(places), min_size=min(2, most), max_size=most, unique=True))
    edit(data, told, edited)
    check(bundles, told, scratch / "b", tally)


def edit(data: st.DataObject, told: dict[str, Any], edited: Sequence[Path_]) -> None:
    """Something else at each of these places that an edit before has left."""
    for path in edited:
        try:
            options = siblings(told, path)
            put(told, path, take(told, path))
        except (LookupError, TypeError):
            continue
        fits = data.draw(st.integers(0, 3), label="fits") > 0  # mostly: what does not seldom reaches the verifier
        value = data.draw(st.sampled_from(options) if fits else JSON_LEAVES, label="value")
        put(told, path, copy.deepcopy(value))  # a later edit may be within it


PIPELINE = "same[bf16,prompts_a_b_a]"


@pytest.fixture(scope="module")
def pipeline(bundles: Any) -> Any:
    """A run of one case of level pipeline."""
    cases = tuple(case for case in checks.get("same").cases("bf16") if case.id == PIPELINE)
    return bundles.run(cases, "reference", bundles.result.setup.root, committed(), levels=("pipeline",))


def test_no_edit_of_a_pipelines_case_is_accepted(pipeline: Any, scratch: Path) -> None:
    with pipeline.closed():
        assert [str(f) for f in pipeline.verify(pipeline.write(scratch / "p")).findings] == []
        fuzzed(lambda data, tally: edit_anywhere(data, pipeline, scratch, tally, under=("cases", 0)))
        fuzzed(lambda data, tally: edit_anywhere(data, pipeline, scratch, tally, most=3, under=("cases", 0)))


def test_a_pipelines_digests_are_those_of_its_outputs(pipeline: Any, scratch: Path) -> None:
    """What must be the same to the bit is attested, but not against the kept latents."""
    with pipeline.closed():
        told = pipeline.report()
        digests = told["cases"][0]["facts"]["digests"]
        digests["a"]["0"][0] = digests["again"]["0"][0] = "0" * 64
        assert "the kept latents are not those that were compared" in pipeline.refusals(
            pipeline.forge(told, scratch / "b")
        )


@pytest.fixture(scope="module")
def timed() -> dict[str, Any]:
    """A synthetic report with a section on real time."""
    made: dict[str, Any] = realtime_report.report()
    assert realtime.check(made["realtime"], made) == []
    return made


@FUZZ
@given(data=st.data())
def test_no_edit_of_the_section_on_real_time_is_accepted(data: st.DataObject, timed: dict[str, Any]) -> None:
    """In one place or in several: it follows from the cases' records, whatever is beside it."""
    told = copy.deepcopy(timed)
    places = [p for p in paths(told) if p[0] == "realtime"]
    edited = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=4, unique=True))
    edit(data, told, edited)
    moved = [path for path in differing(told["realtime"], timed["realtime"]) if not alike(told, timed, path)]
    assert bool(realtime.check(told["realtime"], told)) == bool(moved), moved


def alike(told: dict[str, Any], original: dict[str, Any], path: Path_) -> bool:
    """Whether it is one figure, which 1 and 1.0 are."""
    one, other = take(told["realtime"], path), take(original["realtime"], path)
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (one, other))
    return numbers and math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)


def siblings(told: dict[str, Any], path: tuple[Any, ...]) -> list[Any]:
    """Values that fit the place by kind: the same in other cases, and numbers near by."""
    value = take(told, path)
    found: list[Any] = [copy.deepcopy(value)]
    if path[0] == "cases" and len(path) > 2:
        for other in told["cases"]:
            try:
                found.append(copy.deepcopy(take(other, path[2:])))
            except (KeyError, IndexError, TypeError):
                continue
    if isinstance(value, bool):
        found.append(not value)
    elif isinstance(value, int | float):
        found += [value * 2, value / 2, -value, value + 1, type(value)(value * 1.01)]
    elif isinstance(value, str):
        found += [value + " ", value.upper(), value[1:]]
    return found


def test_no_edit_of_a_conclusion_is_accepted(closed: Any, scratch: Path) -> None:
    """What follows from the rest has one value."""

    def conclude(data: st.DataObject, tally: Tally) -> None:
        told = closed.report()
        path = data.draw(st.sampled_from([p for p in paths(told) if p[0] in DERIVED]), label="place")
        put(told, path, data.draw(st.one_of(st.sampled_from(siblings(told, path)), JSON_LEAVES), label="value"))
        check(closed, told, scratch / "b", tally, derive=False)

    fuzzed(conclude)


def test_nothing_is_removed_added_or_renamed(closed: Any, scratch: Path) -> None:
    fuzzed(lambda data, tally: rearrange(data, closed, scratch, tally))


def rearrange(data: st.DataObject, closed: Any, scratch: Path, tally: Tally) -> None:
    told = closed.report()
    path = data.draw(st.sampled_from([p for p in paths(told) if p[0] not in DERIVED]), label="place")
    holder = take(told, path[:-1])
    how = data.draw(st.sampled_from(["remove", "twice", "rename"]), label="how")
    if isinstance(holder, list):
        value = holder.pop(path[-1]) if how == "remove" else holder[path[-1]]
        if how != "remove":
            holder.insert(data.draw(st.integers(0, len(holder))), value)
    elif how == "remove":
        del holder[path[-1]]
    else:
        value = holder[path[-1]] if how == "twice" else holder.pop(path[-1])
        holder[data.draw(st.text(min_size=1, max_size=10))] = value
    if not tally.forge(closed, told, scratch / "b"):
        return
    outcome = closed.verify(scratch / "b")
    assert not outcome.accepted or attested(path[:-1]) or outcome.report == closed.report()


@FUZZ
@given(data=st.data())
def test_no_edit_of_an_output_is_accepted(data: st.DataObject, closed: Any, scratch: Path) -> None:
    """Beyond rounding to the dtype nothing may differ: small outputs by their digest, others by the oracle."""
    name = data.draw(st.sampled_from(sorted(closed.tensors)), label="output")
    tensors = {k: v.clone() for k, v in closed.tensors.items()}
    values = tensors[name]
    whole = (
        values.numel()
        == torch.Size(
            next(c for c in closed.result.records if name.startswith(c["id"] + "/"))["outputs"][
                name.rpartition("/")[2]
            ]["shape"]
        ).numel()
    )
    place = data.draw(st.integers(0, values.numel() - 1), label="element")
    old = values[place].clone()
    values[place] = data.draw(st.floats(width=16, allow_nan=True, allow_infinity=True), label="value")
    folder = closed.forge(closed.report(), scratch / "b", tensors=tensors)
    changed = not torch.equal(old.reshape(1).view(torch.uint8), values[place].reshape(1).view(torch.uint8))
    if closed.verify(folder).accepted:
        assert not changed or not whole
        # Of an output kept in part an element may differ by what leaves every statistic where it was told to be.
        assert not changed or abs(float(old) - float(values[place])) < 0.02 * float(closed.tensors[name].abs().max())


FILES = ("report.json", "report.html", "junit.xml", "MANIFEST.json", "outputs/ops.safetensors", "graphs/stage0.txt")


@FUZZ
@given(data=st.data())
def test_no_damage_to_a_file_is_accepted_or_crashes(data: st.DataObject, closed: Any, scratch: Path) -> None:
    folder = scratch / "damage"
    shutil.rmtree(folder, ignore_errors=True)
    closed.write(folder)
    name = data.draw(st.sampled_from(FILES), label="file")
    original = (folder / name).read_bytes()
    if data.draw(st.booleans(), label="cut"):
        made = original[: data.draw(st.integers(0, len(original)))]
    else:
        at = data.draw(st.integers(0, len(original)), label="at")
        made = original[:at] + data.draw(st.binary(min_size=1, max_size=8)) + original[at:]
    (folder / name).write_bytes(made)
    sealed = data.draw(st.booleans(), label="sealed")
    if sealed and name != manifest.MANIFEST:
        closed.seal(folder)
    outcome = closed.verify(folder)
    assert outcome.accepted == (made == original) or (name == manifest.MANIFEST and harmless(made, original))
    for finding in outcome.findings:
        assert str(finding).isprintable()


def harmless(made: bytes, original: bytes) -> bool:
    """White space between tokens of the manifest says nothing; under a signature not even that may change."""
    return re.sub(rb"\s", b"", made) == re.sub(rb"\s", b"", original)


def test_the_list_of_attested_fields_is_exact(closed: Any, tmp_path: Path) -> None:
    """Each of them can be said otherwise without a key: the list promises no more than is true."""
    edits: dict[str, Any] = {
        "backend": lambda r: r["backend"].update(kernels=1),
        "environment": lambda r: r["environment"].update(cpu="a better one"),
        "cases.*.facts": lambda r: r["cases"][0]["facts"].update(more=1),
        "cases.*.coverage": lambda r: r["cases"][0].update(coverage=[["add", 7, 0, 0, ""]]),
        "cases.*.seconds": lambda r: r["cases"][0].update(seconds=round(r["cases"][0]["seconds"] / 2, 6)),
        "setup": lambda r: r["setup"].update(options={"size": "tiny"}),
        "started": lambda r: r.update(started="2026-01-01T00:00:00+00:00"),
        "finished": lambda r: r.update(finished="2036-01-01T00:00:00+00:00"),
        "peak_rss": lambda r: r["peak_rss"].update(worker=1),
        "workers": lambda r: r["workers"].update(started=9),
        "problem": lambda r: r.update(problem="the cable was pulled"),
    }
    for name, edit in edits.items():
        assert name in verify.ATTESTED
        told = closed.report()
        edit(told)
        assert closed.report() != told
        outcome = closed.verify(closed.forge(told, tmp_path / "b"))
        assert [str(f) for f in outcome.findings] == [], name
    # One needs a backend that declines; the other turns a failure into a pass, and here nothing fails.
    assert set(verify.ATTESTED) - set(edits) == {"cases.*.unsupported", "cases.*.outputs.*.finite"}
