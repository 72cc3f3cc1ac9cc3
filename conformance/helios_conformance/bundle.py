"""The bundle: the evidence of a run as one folder.

::

    report.json  report.html  junit.xml
    outputs/<level>.safetensors     kept elements, as "<case id>/<output>"
    graphs/<name>.txt               the plan of the published size as this backend lowers it
    MANIFEST.json                   size and SHA-256 of all of them; MANIFEST.json.sig where it was signed

``MANIFEST.json`` comes last: a folder without it is no bundle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from safetensors.torch import save
from torch import Tensor

from helios.media.storage import need_space, writing
from helios_conformance import graphs, html, manifest, report
from helios_conformance.case import LEVELS, is_diagnostic
from helios_conformance.manifest import MANIFEST, SIGNATURE
from helios_conformance.run import RunFolder, RunResult

__all__ = ["NO_GRAPHS", "junit", "tensors_by_level", "write", "write_report"]

NO_GRAPHS = "none"
"""Name of the text that says why there are no graphs."""

_PARTIAL = ".bundle.partial"


def write(
    result: RunResult, out: Path, *, tensors: Mapping[str, Tensor] | None = None, texts: Mapping[str, str] | None = None
) -> Path:
    """Write the bundle of a run.

    Args:
        result: of the run.
        out: folder; where it is the run's own, the run's files are taken away when the bundle stands.
        tensors: kept elements by ``case/output``; those in the run's folder unless given.
        texts: graphs by name; lowered by a process of their own unless given. Where the backend cannot be asked there
            are none.

    Returns:
        ``out``.

    Raises:
        StorageError: no room, or not writable. No manifest stands then, and nothing half-written.
    """
    told = report.assemble(result)
    kept = tensors_by_level(told["cases"], result.tensors if tensors is None else tensors)
    partial = out / _PARTIAL
    need_space(out, _size(told, kept), purpose="the bundle")
    with writing(out):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_report(told, kept, partial)
            _write_graphs(result, partial / "graphs", texts)
            _write_manifest(partial)
            _move(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if out == result.setup.out:
        RunFolder(out).clear()
    return out


def write_report(told: Mapping[str, Any], kept: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
    """The files that follow from a report and its tensors: all but graphs and manifest."""
    (folder / "report.json").write_bytes(report.dumps(told))
    html.write(told, folder / "report.html")
    (folder / "junit.xml").write_bytes(junit(told))
    if kept:
        (folder / "outputs").mkdir()
    for level, named in kept.items():
        (folder / "outputs" / f"{level}.safetensors").write_bytes(save(dict(named)))


def tensors_by_level(cases: Iterable[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The kept elements that the cases name, by level; levels without any are absent."""
    found: dict[str, dict[str, Tensor]] = {level: {} for level in LEVELS}
    for case in cases:
        for output in case["outputs"]:
            name = f"{case['id']}/{output}"
            found[case["level"]][name] = tensors[name].contiguous()
    return {level: named for level, named in found.items() if named}


def junit(told: Mapping[str, Any]) -> bytes:
    """The cases in the XML that CI systems read. A required case that did not pass is a failure, whatever its state; an
    engine's single op that did not is skipped, for it decides nothing."""
    cases = told["cases"]
    kinds = [_outcome(case, told["scope"]["kind"])[0] for case in cases]
    totals = {"tests": str(len(cases))}
    totals |= {"failures": str(kinds.count("failure")), "skipped": str(kinds.count("skipped"))}
    seconds = f"{sum(case['seconds'] for case in cases):.3f}"
    root = ElementTree.Element("testsuites", totals)
    name = f"helios {_legal(told['backend']['label'])} {told['scope']['precision']}"
    suite = ElementTree.SubElement(root, "testsuite", {"name": name, **totals, "time": seconds})
    for case in cases:
        about = {"classname": f"helios.{case['level']}", "name": case["id"], "time": f"{case['seconds']:.3f}"}
        entry = ElementTree.SubElement(suite, "testcase", about)
        kind, text = _outcome(case, told["scope"]["kind"])
        if kind:
            ElementTree.SubElement(entry, kind, {"message": text}).text = text
    ElementTree.indent(root)
    return f"{ElementTree.tostring(root, encoding='unicode')}\n".encode()


def _outcome(case: Mapping[str, Any], kind: str) -> tuple[str, str]:
    """The element that tells of a case that did not pass, and its text; nothing of one that did."""
    if case["state"] == "pass":
        return "", ""
    text = _legal(f"{case['state']}: {case['reason']}")
    if is_diagnostic(kind, case["level"]):
        return "skipped", f"diagnostic for engines, not required: {text}"
    return "failure" if case["state"] == "fail" or case["required"] else "skipped", text


_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _legal(text: str) -> str:
    """XML has no place for control characters."""
    return _ILLEGAL.sub("�", text)


def _write_graphs(result: RunResult, folder: Path, texts: Mapping[str, str] | None) -> None:
    if texts is None:
        why = "the backend could not be asked"
        if result.backend.get("device") and result.setup.precision in result.backend["precisions"]:
            why = graphs.of_spec(result.setup.spec, result.setup.precision, folder)
        texts = {NO_GRAPHS: f"{why}\n"} if why else {}
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def _write_manifest(folder: Path) -> None:
    text = json.dumps(manifest.build(folder), indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _size(told: Mapping[str, Any], kept: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Bytes, roughly: tensors, and the report as JSON, HTML and XML."""
    tensors = sum(t.nbytes + 256 for named in kept.values() for t in named.values())
    return tensors + 4 * len(report.dumps(told)) + (2 << 20)


def _move(partial: Path, out: Path) -> None:
    """Everything into its place, the manifest last; an old one is gone before anything changes."""
    (out / SIGNATURE).unlink(missing_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)
    for name in sorted(os.listdir(partial), key=lambda name: name == MANIFEST):
        target = out / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(partial / name, target)
    partial.rmdir()
