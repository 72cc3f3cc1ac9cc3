"""Signatures of bundles by SSH keys: ``ssh-keygen -Y`` over ``MANIFEST.json``, which holds the digest of every file.

Keys are OpenSSH's affair alone: files, agents and hardware keys all work, and nothing here ever reads a private one.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from helios.errors import InputError, StorageError
from helios.media.storage import writing
from helios_conformance.intake import Refused, read_bytes, shown
from helios_conformance.manifest import MANIFEST, SIGNATURE

__all__ = ["NAMESPACE", "check", "fingerprint", "sign"]

NAMESPACE = "helios-conformance"
"""So that a signature made for something else never counts here."""

_BEGIN, _END = b"-----BEGIN SSH SIGNATURE-----", b"-----END SSH SIGNATURE-----"
_BYTES = 64 << 10
_SECONDS = 120


def sign(folder: Path, key: Path) -> Path:
    """Sign a bundle.

    Args:
        folder: of the bundle.
        key: file of a private key, or of the public half of one that the agent holds.

    Returns:
        the signature's file, ``MANIFEST.json.sig``.

    Raises:
        InputError: no such key, or ssh-keygen is missing or refuses it; its own words are in the message.
        StorageError: the signature cannot be written.
    """
    if not key.is_file():
        raise InputError(f"there is no key {key}", "ssh-keygen -t ed25519 makes one")
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} holds no {MANIFEST}", "sign what `helios certify` wrote")
    with writing(folder / SIGNATURE):
        data = (folder / MANIFEST).read_bytes()
    # Over standard input the signature comes back on standard output: nothing half-written, no overwrite question.
    done = _run(["-Y", "sign", "-f", str(key), "-n", NAMESPACE], data)
    if done.returncode or not done.stdout.startswith(_BEGIN):
        why = f"ssh-keygen did not sign with {key}: {_words(done)}"
        raise InputError(why, "check the key, its passphrase or agent")
    _put(folder / SIGNATURE, done.stdout)
    return folder / SIGNATURE


def check(folder: Path, signer: Path) -> str:
    """Who signed a bundle.

    Args:
        folder: of the bundle.
        signer: a public key's file, or a file of allowed signers as of ssh-keygen(1).

    Returns:
        the principal of the allowed signers, or the key's fingerprint.

    Raises:
        Refused: there is no signature, or it is not theirs, or not of this manifest.
        InputError: ssh-keygen is missing, or the file of signers cannot be read.
    """
    signature = _signature(folder)
    data = read_bytes(folder / MANIFEST, MANIFEST, 1 << 20)
    with _allowed(signer) as allowed:
        found = _run(["-Y", "find-principals", "-f", str(allowed), "-s", str(signature)])
        principals = found.stdout.decode(errors="replace").splitlines()
        if found.returncode or not principals:
            raise Refused(SIGNATURE, f"signed by nobody whom {signer} allows ({_words(found)})")
        command = ["-Y", "verify", "-f", str(allowed), "-I", principals[0], "-n", NAMESPACE, "-s", str(signature)]
        done = _run(command, data)
    if done.returncode:
        raise Refused(SIGNATURE, f"it is no signature of this manifest: {_words(done)}")
    return shown(principals[0]) if principals[0] != _ANYONE else _key_of(done)


def fingerprint(folder: Path) -> str | None:
    """The key of a signature that fits the manifest, whoever that is; None where there is no signature, and words that
    say so where there is no ssh-keygen to look at it. Raises Refused where it does not fit."""
    if not os.path.lexists(folder / SIGNATURE):
        return None
    if shutil.which("ssh-keygen") is None:
        return "somebody, which only ssh-keygen can check"
    signature = _signature(folder)
    data = read_bytes(folder / MANIFEST, MANIFEST, 1 << 20)
    done = _run(["-Y", "check-novalidate", "-n", NAMESPACE, "-s", str(signature)], data)
    if done.returncode:
        raise Refused(SIGNATURE, f"it is no signature of this manifest: {_words(done)}")
    return _key_of(done)


_ANYONE = "the-named-key"


@contextlib.contextmanager
def _allowed(signer: Path) -> Iterator[Path]:
    """The allowed signers' file; made where a public key was named."""
    try:
        text = signer.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise InputError(f"--signer {signer} cannot be read: {error}", "name a .pub file or allowed signers") from error
    if "PRIVATE KEY" in text:
        raise InputError(f"--signer {signer} is a private key", f"name its public half, {signer}.pub")
    if not text.startswith(("ssh-", "ecdsa-", "sk-")):
        yield signer
        return
    with tempfile.TemporaryDirectory(prefix="helios-signer-") as folder:
        made = Path(folder) / "allowed_signers"
        made.write_text(f'{_ANYONE} namespaces="{NAMESPACE}" {text.splitlines()[0]}\n', encoding="utf-8")
        yield made


def _signature(folder: Path) -> Path:
    """The signature's file, of exactly the form in which OpenSSH writes it: a signature that could be written in two
    ways could be changed."""
    data = read_bytes(folder / SIGNATURE, SIGNATURE, _BYTES)
    lines = data.split(b"\n")
    try:
        body = base64.b64decode(b"".join(lines[1:-2]), validate=True)
    except binascii.Error:
        body = b""
    text = base64.b64encode(body)
    wrapped = [text[i : i + 70] for i in range(0, len(text), 70)]
    if not body or data != b"\n".join([_BEGIN, *wrapped, _END, b""]):
        raise Refused(SIGNATURE, "it is no SSH signature as ssh-keygen writes it")
    return folder / SIGNATURE


def _run(arguments: Sequence[str], data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    if shutil.which("ssh-keygen") is None:
        raise InputError("signatures need ssh-keygen, which is not here", "install OpenSSH's client (openssh-client)")
    command = ["ssh-keygen", *arguments]
    try:
        return subprocess.run(command, input=data, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"ssh-keygen gave no answer in {_SECONDS} s", "unlock the key in an agent first") from error


def _words(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = (done.stderr + b"\n" + done.stdout).decode(errors="replace").splitlines()
    return shown("; ".join(line.strip() for line in lines if line.strip())) or f"status {done.returncode}"


def _key_of(done: subprocess.CompletedProcess[bytes]) -> str:
    """The fingerprint in "Good … signature … with ED25519 key SHA256:…"."""
    words = done.stdout.decode(errors="replace").split()
    return next((shown(word) for word in words if word.startswith("SHA256:")), "an unnamed key")


def _put(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        with writing(path):
            part.write_bytes(data)
            os.replace(part, path)
    except StorageError:
        part.unlink(missing_ok=True)
        raise
