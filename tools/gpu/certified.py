"""The conformance suite's commands in processes of their own, within a time; what they leave goes into one archive."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from results import Clock, LaterError, NotThereError, Record

__all__ = ["ARCHIVE", "certify", "level", "working"]

ARCHIVE = "certify.zip"
LARGEST = 16 << 20
"""Bytes of a file that comes back from a machine."""
RESERVE = 20.0
"""Seconds that are left for the report, its verification and the archive."""
INTERRUPTED = 130
NEEDED = ("typer", "rich", "safetensors", "numpy", "jsonschema")
"""What the commands import beside torch."""


@contextlib.contextmanager
def working(out: Path) -> Iterator[Path]:
    """A folder with what the archive of an earlier run holds; packed again at the end, whatever happens."""
    archive = out / ARCHIVE
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if archive.exists():
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)
        try:
            yield folder
        finally:
            pack(folder, archive)


def pack(folder: Path, archive: Path) -> None:
    """Everything in one file, and a line where that is too large to come back."""
    out = archive.with_suffix(".tmp")
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            file.write(path, path.relative_to(folder))
    out.replace(archive)
    if archive.stat().st_size > LARGEST:
        print(f"{archive} has {archive.stat().st_size >> 20} MiB: more than some machines send back", flush=True)


def level(args: argparse.Namespace, clock: Clock, name: str, options: Sequence[str]) -> Record:
    """``certify`` with the archive of a part that has no other."""
    with working(args.out) as folder:
        return certify(args, clock, folder / name, options)


def certify(args: argparse.Namespace, clock: Clock, folder: Path, options: Sequence[str]) -> Record:
    """``helios certify`` into a folder, or on with what is there; then ``helios verify`` of a bundle.

    Args:
        args: ``device``.
        clock: the run is interrupted when it is over.
        folder: of the run.
        options: of the command.

    Returns:
        ``sentence`` and ``word`` of the verdict, ``levels``, ``verified``, ``correct``.

    Raises:
        LaterError: it was interrupted and can be gone on with.
        NotThereError: this machine lacks what the command imports.
        RuntimeError: neither a run nor a bundle came of it; the text is what the command said.
    """
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise NotThereError(f"the command helios needs {', '.join(absent)}: put their wheels into .whl/")
    backend = ["--backend", "cuda" if args.device == "cuda" else "cpu"]
    given = [*backend, *options]
    if (folder / "run.json").exists():
        given = ["--resume"]
    elif folder.exists() and not (folder / "report.json").exists():
        shutil.rmtree(folder)  # nothing that could be gone on with
    said = ""
    if not (folder / "report.json").exists():
        said = _run(["certify", *given, "--out", str(folder)], clock.left() - RESERVE)[1]
    if not (folder / "report.json").exists():
        if not (folder / "run.json").exists():
            raise RuntimeError(said.strip()[-300:] or "helios certify said nothing")
        done = len(list((folder / "cases").glob("*.json")))
        raise LaterError(f"out of time after {done} cases; the next run goes on")
    return _judged(folder, clock)


def _judged(folder: Path, clock: Clock) -> Record:
    """The verdict of a bundle, and whether another process agrees with it. Raises LaterError without time for that."""
    verdict = json.loads((folder / "report.json").read_text(encoding="utf-8"))["verdict"]
    code, said = _run(["verify", str(folder)], max(clock.left(), 0.0) + RESERVE)
    if code < 0 or code == INTERRUPTED:
        raise LaterError("out of time for helios verify; the next run verifies what is there")
    failed = verdict["word"] == "not certified"
    record: Record = {"sentence": verdict["sentence"], "word": verdict["word"]}
    record |= {"levels": {name: told["state"] for name, told in verdict["levels"].items()}, "verified": code == 0}
    record |= {"verify_said": said.strip()[-300:], "correct": code == 0 and not failed}
    return record | ({} if record["correct"] else {"why": f"{verdict['sentence']} verify: {code}"})


def _run(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """One command of helios, interrupted as by a key when its time is over; exit code and what it said."""
    words = [sys.executable, "-m", "helios", *command]
    print(f"$ {shlex.join(words[2:])}  ({max(seconds, 1.0):.0f} s)", flush=True)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            said, _ = process.communicate(timeout=RESERVE)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
    return process.returncode, said
