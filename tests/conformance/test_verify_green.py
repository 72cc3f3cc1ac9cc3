"""What did not pass is not turned green: the forger has no key, draws every conclusion anew, and is refused."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helios import op
from helios.backend import DeviceInfo, Kernel, ReferenceBackend
from helios.graph import Node

WRONG, DECLINED, LOST, LEFT = "linear[bf16,small]", "silu[bf16,odd]", "add[bf16,small]", "concat[bf16,one]"


class Faulty(ReferenceBackend):
    """Its linear layers are off by a fiftieth, and it has no silu."""

    name = label = "faulty"

    def __init__(self) -> None:
        super().__init__()
        right = op.get("linear").fn
        wrong = functools.wraps(right)(lambda *operands, **attrs: right(*operands, **attrs) * 1.02)
        self.kernels = {**self.kernels, "linear": Kernel(wrong)}

    def devices(self) -> list[DeviceInfo]:
        return [DeviceInfo(0, "a faulty device", 1 << 34)]

    def supports(self, node: Node) -> str | None:
        return "there is no silu yet" if node.op == "silu" else super().supports(node)


@pytest.fixture(scope="module")
def faulty(bundles: Any) -> Any:
    """A run in which one case failed, one was declined, one lost its worker, and one was never begun."""
    made = bundles.run(bundles.cases, "faulty", bundles.result.setup.root, bundles.references, Faulty())
    for case, fact, state in ((LOST, "lost", "fail"), (LEFT, "not_run", "not_run")):
        told = next(c for c in made.result.records if c["id"] == case)
        told |= {"state": state, "reason": "of the driver", "facts": {fact: "of the driver"}}
        told |= {"outputs": {}, "coverage": []}
        for name in [n for n in made.tensors if n.startswith(f"{case}/")]:
            del made.tensors[name]
    made.result.workers = {"started": 2, "lost": 1}
    with made.closed():
        yield made


def test_it_is_accepted_as_what_it_is(faulty: Any, tmp_path: Path) -> None:
    outcome = faulty.verify(faulty.write(tmp_path / "b"))
    assert [str(f) for f in outcome.findings] == []
    assert outcome.report["verdict"]["word"] == "not certified"
    states = {c["id"]: c["state"] for c in outcome.report["cases"] if c["state"] != "pass"}
    assert states == {WRONG: "fail", DECLINED: "unsupported", LOST: "fail", LEFT: "not_run"}


Edit = Callable[[dict[str, Any], dict[str, Any]], Any]


def within(case: dict[str, Any], right: dict[str, Any]) -> None:
    """The figures of a right backend."""
    case["outputs"]["o0"] |= {k: right["outputs"]["o0"][k] for k in ("errors", "bounds")}


def widened(case: dict[str, Any], right: dict[str, Any]) -> None:
    bounds = case["outputs"]["o0"]["bounds"]
    bounds |= {k: v * 1000 for k, v in bounds.items() if k != "count" and not isinstance(v, str)}


def replaced(case: dict[str, Any], right: dict[str, Any]) -> None:
    """The record of a right backend altogether, kept elements left aside."""
    case |= {key: right[key] for key in ("facts", "coverage", "outputs", "unsupported")}


EDITS: dict[str, tuple[str, Edit, str]] = {
    "a failure": (WRONG, lambda c, r: None, "state: it says pass, recomputed fail"),
    "a failure within its bounds": (WRONG, within, r"errors\.norm: it says"),
    "a failure with wider bounds": (WRONG, widened, r"bounds\.norm: it says"),
    "a failure by another's record": (WRONG, replaced, r"outputs\.o0\.digest: it is not the SHA-256"),
    "a declined case": (DECLINED, lambda c, r: None, "state: it says pass, recomputed unsupported"),
    "a declined case without its reason": (
        DECLINED,
        lambda c, r: c.update(unsupported=""),
        "state: it says pass, recomputed fail",
    ),
    "a declined case by another's record": (DECLINED, replaced, f"it lacks {re.escape(DECLINED)}/o0"),
    "a lost worker": (LOST, lambda c, r: None, "state: it says pass, recomputed fail"),
    "a lost worker forgotten": (LOST, lambda c, r: c.update(facts={}), "state: it says pass, recomputed fail"),
    "a lost worker by another's record": (LOST, replaced, f"it lacks {re.escape(LOST)}/o0"),
    "a case not run": (LEFT, lambda c, r: None, "state: it says pass, recomputed not_run"),
    "a case not run forgotten": (LEFT, lambda c, r: c.update(facts={}), "state: it says pass, recomputed fail"),
    "a case not run by another's record": (LEFT, replaced, f"it lacks {re.escape(LEFT)}/o0"),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_did_not_pass_is_not_turned_green(name: str, faulty: Any, bundles: Any, tmp_path: Path) -> None:
    chosen, edit, pattern = EDITS[name]
    told = faulty.report()
    case = next(c for c in told["cases"] if c["id"] == chosen)
    right = next(c for c in bundles.report()["cases"] if c["id"] == chosen)
    edit(case, right)
    case.update(state="pass", reason="")
    folder = faulty.forge(told, tmp_path / "b")
    for file in ("junit.xml", "report.html"):  # they say so too: nothing but the judgement anew can refuse it
        assert chosen in (folder / file).read_text()
    found = faulty.refusals(folder)
    assert not re.search(r"junit\.xml|report\.html|MANIFEST|verdict", found), found
    assert re.search(pattern, found), found


def test_a_run_turned_green_altogether_is_refused(faulty: Any, tmp_path: Path) -> None:
    told = faulty.report()
    for case in told["cases"]:
        case.update(state="pass", reason="")
    folder = faulty.forge(told, tmp_path / "b")
    assert '"word": "certified"' in (folder / "report.json").read_text()
    found = faulty.refusals(folder)
    for case in (WRONG, DECLINED, LOST, LEFT):
        assert f"cases.{case}.state: it says pass, recomputed" in found


def test_the_elements_of_a_failure_are_not_replaced_by_right_ones(faulty: Any, bundles: Any, tmp_path: Path) -> None:
    """Right elements have another digest, and the digest says which elements are kept: with both replaced it is another
    run, of a device that was right."""
    told = faulty.report()
    next(c for c in told["cases"] if c["id"] == WRONG).update(state="pass", reason="")
    tensors = {**faulty.tensors, f"{WRONG}/o0": bundles.tensors[f"{WRONG}/o0"]}
    found = faulty.refusals(faulty.forge(told, tmp_path / "b", tensors=tensors))
    assert "outputs.o0.digest: it is not the SHA-256" in found
