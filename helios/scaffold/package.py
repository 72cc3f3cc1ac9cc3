"""Which files a new backend's package has, under which names, and how they come onto the disk: all, or none."""

from __future__ import annotations

import dataclasses
import importlib.util
import keyword
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import jinja2

from helios.backend import API_VERSION, names
from helios.errors import InputError, StorageError, unknown_name

__all__ = ["KINDS", "Package", "write"]

KINDS: Mapping[str, str] = {
    "kernels": "kernels of your own, one an op",
    "torch-device": "a device that PyTorch addresses, by a plugin or built in",
    "engine": "a compiler that takes ONNX graphs whole",
}
"""How a vendor's software takes work."""

RESERVED = ("auto", "reference")
"""What a selection by name means without any package."""

COMMON = {
    "pyproject.toml": "pyproject.toml.j2",
    "README.md": "README.md.j2",
    "xfails.toml": "xfails.toml.j2",
    ".gitignore": "gitignore.j2",
    ".github/workflows/ci.yml": "ci.yml.j2",
    "helios_{name}/__init__.py": "init.py.j2",
    "helios_{name}/py.typed": "py.typed.j2",
    "tests/test_{name}.py": "test_backend.py.j2",
}
"""Files of every kind, by the name of their template in the folder ``common``."""

OWN = {
    "kernels": ("backend.py", "kernels.py"),
    "torch-device": ("backend.py", "kernels.py"),
    "engine": ("backend.py", "engine.py", "translate.py"),
}
"""Modules that differ by kind."""


@dataclasses.dataclass(frozen=True, slots=True)
class Package:
    """What is asked for, checked.

    Args:
        name: of the backend, as ``--backend`` will take it: a lower-case Python identifier.
        kind: one of ``KINDS``.
        torch_device: of kind ``torch-device``, what torch calls the device; empty for the backend's own name.

    Raises:
        InputError: the name is none, is reserved or taken, the kind is unknown, or the device is none or of no use.
    """

    name: str
    kind: str = "kernels"
    torch_device: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(unknown_name("kind", self.kind, KINDS), f"--kind {' or '.join(KINDS)}")
        _check_name(self.name)
        if self.torch_device and self.kind != "torch-device":
            raise InputError(f"--torch-device says nothing to kind {self.kind!r}", "--kind torch-device")
        if self.torch_device and not re.fullmatch(r"[a-z][a-z0-9_]*", self.torch_device):
            raise InputError(
                f"{self.torch_device!r} is not what torch calls a kind of device",
                "--torch-device xpu, say; which one of several is chosen by --backend NAME:1",
            )

    @property
    def module(self) -> str:
        """Its Python package."""
        return f"helios_{self.name}"

    @property
    def distribution(self) -> str:
        """What pip calls it."""
        return f"helios-{self.name.replace('_', '-')}"

    @property
    def cls(self) -> str:
        """The backend's class.

        >>> Package("my_chip").cls
        'MyChipBackend'
        """
        return "".join(part.capitalize() for part in self.name.split("_")) + "Backend"

    def files(self) -> dict[str, str]:
        """The text of every file by its path in the package."""
        made = jinja2.Environment(
            loader=jinja2.PackageLoader("helios.scaffold", "templates"),
            undefined=jinja2.StrictUndefined,
            keep_trailing_newline=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        templates = {path: f"common/{template}" for path, template in COMMON.items()}
        templates |= {f"helios_{{name}}/{file}": f"{self.kind}/{file}.j2" for file in OWN[self.kind]}
        given = {
            "name": self.name,
            "kind": self.kind,
            "module": self.module,
            "distribution": self.distribution,
            "cls": self.cls,
            "torch_device": self.torch_device or self.name,
            "api_version": API_VERSION,
        }
        return {
            path.format(name=self.name): made.get_template(template).render(given)
            for path, template in sorted(templates.items())
        }


def _check_name(name: str) -> None:
    """Refuse what cannot be a backend's name. Raises InputError."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        near = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        near = near if re.match(r"[a-z]", near) and not keyword.iskeyword(near) else "mychip"
        raise InputError(
            f"{name!r} cannot name a backend: wanted a Python identifier of lower-case letters, digits and _",
            f"helios new-backend {near}",
        )
    if name in RESERVED:
        raise InputError(f"{name!r} is reserved: `--backend {name}` has a meaning of its own", "choose another name")
    if name in names():
        raise InputError(f"an installed backend has the name {name!r}", "choose another; `helios backends` lists them")
    if importlib.util.find_spec(f"helios_{name}") is not None:
        raise InputError(f"an installed package has the name helios_{name}", "choose another name")


def write(package: Package, folder: Path) -> list[Path]:
    """Write the package: all of it, or nothing.

    Args:
        package: what to write.
        folder: to make; an empty one may be there.

    Returns:
        the paths of the files, sorted.

    Raises:
        InputError: there is something in the folder's place; it is left as it is.
        StorageError: it cannot be written; nothing is left of it.
    """
    there = os.path.lexists(folder)
    if there and not (folder.is_dir() and not any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is not a folder"
        raise InputError(f"{folder} exists and {what}; nothing was written", "--out DIR names another one")
    files = package.files()
    try:
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except BaseException as error:
        _clear(folder, keep=there)
        if not isinstance(error, OSError):
            raise
        raise StorageError(f"{folder} cannot be written: {error}", "--out DIR names another place") from error
    return [folder / path for path in files]


def _clear(folder: Path, *, keep: bool) -> None:
    """Take away what was written into a folder that was empty or not there."""
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
