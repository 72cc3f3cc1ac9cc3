"""Signatures by SSH keys: what they show, and that nothing can be changed under one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from helios.cli import main
from helios.errors import InputError
from helios_conformance import manifest, signing, verify
from helios_conformance.intake import Refused

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen here")


def make_key(folder: Path, name: str) -> Path:
    path = folder / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", path], check=True)
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: make_key(folder, name) for name in ("vendor", "lab", "stranger")}


@pytest.fixture(scope="module")
def allowed(keys: dict[str, Path]) -> Path:
    path = keys["vendor"].parent / "allowed_signers"
    lines = [f"{name}@example.org {keys[name].with_suffix('.pub').read_text()}" for name in ("vendor", "lab")]
    path.write_text("".join(lines))
    return path


@pytest.fixture
def signed(closed: Any, keys: dict[str, Path], tmp_path: Path) -> Path:
    folder = closed.write(tmp_path / "b")
    assert signing.sign(folder, keys["vendor"]) == folder / manifest.SIGNATURE
    return folder


def test_who_signed(closed: Any, signed: Path, keys: dict[str, Path], allowed: Path) -> None:
    outcome = closed.verify(signed, signer=allowed)
    assert outcome.accepted
    assert (outcome.signer, outcome.vouched) == ("vendor@example.org", True)
    by_key = closed.verify(signed, signer=keys["vendor"].with_suffix(".pub"))
    assert by_key.accepted
    assert by_key.signer.startswith("SHA256:")
    unasked = closed.verify(signed)
    assert (unasked.accepted, unasked.signer, unasked.vouched) == (True, by_key.signer, False)


def test_others_are_refused(closed: Any, signed: Path, keys: dict[str, Path], tmp_path: Path) -> None:
    assert "signed by nobody whom" in closed.refusals(signed, signer=keys["stranger"].with_suffix(".pub"))
    unsigned = closed.write(tmp_path / "c")
    assert "MANIFEST.json.sig: it is missing" in closed.refusals(unsigned, signer=keys["vendor"].with_suffix(".pub"))
    other = closed.write(tmp_path / "d", started="2026-01-01T00:00:00+00:00")
    shutil.copy(signed / manifest.SIGNATURE, other)
    assert "no signature of this manifest" in closed.refusals(other)
    assert "MANIFEST.json.sig" in closed.refusals(other, signer=keys["vendor"].with_suffix(".pub"))


def test_a_signature_made_for_something_else_does_not_count(
    closed: Any, signed: Path, keys: dict[str, Path], allowed: Path
) -> None:
    (signed / manifest.SIGNATURE).unlink()
    file = signed / manifest.MANIFEST
    subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-f", keys["vendor"], "-n", "git", file], check=True)
    assert "MANIFEST.json.sig" in closed.refusals(signed, signer=allowed)


def test_no_edit_survives_a_signature(closed: Any, signed: Path, allowed: Path) -> None:
    """Any byte anywhere, every way of flipping one bit of it in the signature: refused each time."""
    for name in [manifest.SIGNATURE, manifest.MANIFEST, *manifest.files(signed)]:
        data = (signed / name).read_bytes()
        step = max(1, len(data) // (60 if name == manifest.SIGNATURE else 12))
        for at in {*range(0, len(data), step), len(data) - 1}:
            flipped = bytearray(data)
            flipped[at] ^= 1 << (at % 8)
            (signed / name).write_bytes(bytes(flipped))
            assert not sound(signed, allowed), f"byte {at} of {name}"
        for damaged in (data + b"\n", data[:-1], b" " + data):
            (signed / name).write_bytes(damaged)
            assert not sound(signed, allowed), name
        (signed / name).write_bytes(data)
    assert sound(signed, allowed)
    assert closed.verify(signed, signer=allowed).accepted


def sound(folder: Path, signers: Path) -> bool:
    """What ``verify`` asks first; the rest never makes a refused bundle good."""
    try:
        return not manifest.differences(folder) and bool(signing.check(folder, signers))
    except Refused:
        return False


def test_mistakes_of_the_signer_are_told(
    closed: Any, signed: Path, keys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="there is no key"):
        signing.sign(signed, tmp_path / "none")
    (tmp_path / "bad").write_text("no key at all")
    with pytest.raises(InputError, match="ssh-keygen did not sign with"):
        signing.sign(signed, tmp_path / "bad")
    with pytest.raises(InputError, match="holds no MANIFEST"):
        signing.sign(tmp_path, keys["vendor"])
    with pytest.raises(InputError, match="is a private key"):
        closed.verify(signed, signer=keys["vendor"])
    with pytest.raises(InputError, match="cannot be read"):
        closed.verify(signed, signer=tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="ssh-keygen, which is not here"):
        signing.sign(signed, keys["vendor"])
    with pytest.raises(InputError, match="ssh-keygen, which is not here"):
        closed.verify(signed, signer=keys["vendor"].with_suffix(".pub"))
    unseen = closed.verify(signed)  # consistency needs no ssh-keygen
    assert (unseen.accepted, unseen.vouched) == (True, False)
    assert unseen.signer == "somebody, which only ssh-keygen can check"


def test_a_second_party_reproduces(
    closed: Any,
    signed: Path,
    keys: dict[str, Path],
    allowed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(verify, "committed", lambda: closed.references)
    copied = tmp_path / "copy"
    shutil.copytree(signed, copied)
    (copied / manifest.SIGNATURE).unlink()
    signing.sign(copied, keys["lab"])
    command = ["verify", str(signed), "--signer", str(allowed)]
    assert main([*command, "--reproduced", str(copied)]) == 1
    assert "both runs drew from the same nonce" in capsys.readouterr().out
    assert main([*command, "--reproduced", str(signed)]) == 1
    assert "a party cannot reproduce itself" in capsys.readouterr().out
    again = closed.with_nonce("77").write(tmp_path / "again")
    signing.sign(again, keys["lab"])
    assert main([*command, "--reproduced", str(again)]) == 0
    assert "reproduced; signed by vendor@example.org" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_run_signs_its_bundle(keys: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the first command to the last: run, sign, verify as witness, compare."""
    out, nonce = tmp_path / "out", "5f3a5f3a"
    command = ["certify", "--backend", "reference", "--filter", "add[bf16,small]", "--nonce", nonce, "--out", str(out)]
    assert main([*command, "--sign", str(tmp_path / "none")]) == 2
    assert not out.exists()
    assert main([*command, "--sign", str(keys["vendor"])]) == 0
    capsys.readouterr()
    key = keys["vendor"].with_suffix(".pub")
    assert main(["verify", str(out), "--challenge", nonce, "--signer", str(key)]) == 0
    assert "witnessed; signed by SHA256:" in " ".join(capsys.readouterr().out.split())
    assert main(["verify", str(out), "--signer", str(keys["stranger"].with_suffix(".pub"))]) == 1
    assert main(["compare", str(out), str(out)]) == 0
