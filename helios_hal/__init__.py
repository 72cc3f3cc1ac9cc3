"""What the command ``helios`` starts: it makes sure that the package ``helios`` is ours, then hands over to it.

Other projects own that name, too. One of them in front on Python's path would be imported in place of ours, and nothing
of ours would run that could say so; hence a package of a name that nobody else has, which imports nothing before it
has looked. It stands beside ``helios`` in the tree as in the wheel, so where it is says where ours is.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

__all__ = ["main"]

DISTRIBUTION = "helios-hal"
REINSTALL = f"pip install --force-reinstall --no-deps {DISTRIBUTION}"
OURS = Path(__file__).resolve().parents[1] / "helios"


def main() -> int:
    """The command line's exit status; 2, with one error and one fix on stderr, where ``helios`` is not ours."""
    trouble = _trouble()
    if trouble is not None:
        return _refuse(*trouble)
    try:
        from helios.cli import main as command_line
    except ImportError:
        rivals = _owners(OURS)
        if not rivals:
            raise
        names = ", ".join(rivals)
        why = f"{OURS} is also written by {names}: some of the files there are not those of {DISTRIBUTION}"
        return _refuse(why, f"pip uninstall -y {' '.join(rivals)}; {REINSTALL}")
    return command_line()


def _refuse(why: str, fix: str) -> int:
    sys.stderr.write(f"error: {why}\nfix: {fix}\n")
    return 2


def _trouble() -> tuple[str, str] | None:
    """What is wrong with the package that ``import helios`` would take, and what mends it."""
    spec = find_spec("helios")
    if spec is None or spec.origin is None:
        return f"{OURS} is not complete: it has no __init__.py, and {DISTRIBUTION} cannot run without it", REINSTALL
    origin = Path(spec.origin).resolve()
    place = origin.parent if origin.name.startswith("__init__.") else origin
    if place == OURS:
        return None
    return f"Python would import another package named helios, {place}, in place of {OURS} of {DISTRIBUTION}", _fix(
        place
    )


def _fix(place: Path) -> str:
    # An empty part of PYTHONPATH is the working folder.
    if place.parent in {Path(part).resolve() for part in os.environ.get("PYTHONPATH", os.devnull).split(os.pathsep)}:
        if place.parent == Path.cwd():
            return f"unset PYTHONPATH, or take {place.parent} off it; if it has an empty part, leave that folder"
        return f"unset PYTHONPATH, or take {place.parent} off it"
    owners = _owners(place)
    if owners:
        return f"pip uninstall -y {' '.join(owners)}, or give each of the two an environment of its own"
    return f"take {place.parent} off Python's path (a .pth file may put it there), or move {place} away"


def _owners(place: Path) -> list[str]:
    """The installed distributions other than ours that have files in ``place``, or are that file."""
    from importlib.metadata import distributions

    found = set()
    for distribution in distributions():
        mine = [file for file in distribution.files or () if file.parts[0] == place.name]
        if mine and Path(str(distribution.locate_file(place.name))).resolve() == place:
            found.add(distribution.name)
    return sorted(found - {DISTRIBUTION})
