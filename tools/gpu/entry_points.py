"""Let the tree be found as if it were installed: a distribution's metadata, written from pyproject.toml into a folder.

    python tools/gpu/entry_points.py FOLDER

With the folder on PYTHONPATH, ``importlib.metadata`` lists the entry points of the tree: backends and commands.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

__all__ = ["write"]

ROOT = Path(__file__).resolve().parents[2]


def write(target: Path, root: Path = ROOT) -> Path:
    """Write ``helios_hal-VERSION.dist-info`` into ``target`` and return its path.

    Raises:
        ValueError: helios/__init__.py states no version.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = re.search(
        r'^__version__ = "(.+)"', (root / "helios" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    if found is None:
        raise ValueError('helios/__init__.py has no line __version__ = "…"')
    folder = target / f"{project['name'].replace('-', '_')}-{found[1]}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {found[1]}\n"
    (folder / "METADATA").write_text(metadata, encoding="utf-8")
    groups = {"console_scripts": project.get("scripts", {}), **project.get("entry-points", {})}
    lines = [
        line
        for name, points in groups.items()
        for line in ("", f"[{name}]", *(f"{k} = {v}" for k, v in points.items()))
    ]
    (folder / "entry_points.txt").write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/gpu/entry_points.py FOLDER")
    print(write(Path(sys.argv[1])))
