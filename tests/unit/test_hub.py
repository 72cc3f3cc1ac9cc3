"""From a path or repository id to a folder: the real client of the hub against a small server on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from huggingface_hub import constants

from helios.errors import CheckpointError, InputError, StorageError
from helios.model.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
STRAY = ("transformer_ode/diffusion_pytorch_model.safetensors", "README.md", "vae/weights.bin")

# --- folders ---


def test_an_existing_folder_is_itself(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_a_folder_wins_over_a_repository_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == Path("owner/name")


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no revision 'v1'"):
        resolve(tmp_path, revision="v1")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file") as caught:
        resolve(tmp_path / "model.safetensors")
    assert str(tmp_path) in caught.value.fix


@pytest.mark.parametrize("written", ["models/tinny", "./models/tinny", "{absolute}/models/tinny"])
def test_a_misspelt_path_names_the_nearest_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder") as caught:
        resolve(written.format(absolute=tmp_path))
    assert "did you mean" in caught.value.fix
    assert "models/tiny?" in caught.value.fix


@pytest.mark.parametrize("written", ["just-a-name", "a/b/c/d", "~nobody/x/y"])
def test_what_is_neither_a_folder_nor_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder"):
        resolve(written)


# --- the cache, offline ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("model") / "tiny"
    make_checkpoint.write_checkpoint(folder, size_name="tiny", variant_name="base")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(cache: Path, model: Path) -> Path:
    """The model as the hub's client caches it."""
    repo = cache / "models--owner--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(model, repo / "snapshots" / COMMIT))


def test_offline_a_whole_cached_copy_is_used(cache: Path, model: Path) -> None:
    snapshot = fill(cache, model)
    assert resolve("owner/tiny") == snapshot
    assert resolve("owner/tiny", revision=COMMIT) == snapshot


def test_offline_without_a_copy(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set, and owner/tiny is not in the cache") as caught:
        resolve("owner/tiny", revision="v2")
    assert "HF_HUB_OFFLINE=0 hf download owner/tiny --revision v2" in caught.value.fix


@pytest.mark.parametrize(
    "lost", ["model_index.json", "vae/config.json", "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"]
)
def test_offline_half_a_copy_names_what_is_missing_and_the_command(cache: Path, model: Path, lost: str) -> None:
    (fill(cache, model) / lost).unlink()
    with pytest.raises(CheckpointError) as caught:
        resolve("owner/tiny")
    assert "half downloaded" in caught.value.why
    assert caught.value.why.endswith(f"it lacks {lost}")
    assert caught.value.fix.startswith("HF_HUB_OFFLINE=0 hf download owner/tiny --include 'model_index.json'")


def test_a_link_to_a_lost_blob_counts_as_missing(cache: Path, model: Path) -> None:
    config = fill(cache, model) / "vae" / "config.json"
    config.unlink()
    config.symlink_to(cache / "nowhere")
    with pytest.raises(CheckpointError, match=r"lacks vae/config\.json"):
        resolve("owner/tiny")


# --- the disk ---


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def siblings(model: Path) -> Iterator[Any]:
    for path in sorted(model.rglob("*")):
        if path.is_file():
            yield huggingface_hub.hf_api.RepoSibling(rfilename=str(path.relative_to(model)), size=path.stat().st_size)
    for stray in STRAY:
        yield huggingface_hub.hf_api.RepoSibling(rfilename=stray, size=10**15)


@pytest.fixture
def online(cache: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's answers without a network: the listing, and a download that fills the cache."""
    info = SimpleNamespace(sha=COMMIT, siblings=list(siblings(model)))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(fill(cache, model)))
    return cache


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, count))


def test_too_little_disk_is_found_before_the_download(
    online: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    free(monkeypatch, needed - 1)
    with pytest.raises(StorageError, match=r"owner/tiny needs 0\.0 GB") as caught:
        resolve("owner/tiny")
    assert "HF_HOME" in caught.value.fix
    assert not online.exists()
    free(monkeypatch, needed)
    assert resolve("owner/tiny").is_dir()


def test_what_is_cached_needs_no_room(online: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = fill(online, model)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(snapshot))
    free(monkeypatch, 0)
    assert resolve("owner/tiny") == snapshot


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.usefixtures("online")
def test_a_disk_that_fails_while_downloading(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(StorageError, match="cannot be written"):
        resolve("owner/tiny")


# --- the real client against a server ---


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub's protocol: listing, tree, files, and its two ways to say no."""

    model: Path

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        if "/gated/" in path:
            self.refuse(403, "GatedRepo")
        elif "/owner/tiny" not in path:
            self.refuse(401, "RepoNotFound")
        elif path.startswith("/api/models/owner/tiny") and "/revision/v9" in path:
            self.refuse(404, "RevisionNotFound")
        elif path.startswith(f"/api/models/owner/tiny/tree/{COMMIT}"):
            self.send(json.dumps(self.tree()).encode(), body)
        elif path.startswith("/api/models/owner/tiny"):
            self.send(json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": self.files()}).encode(), body)
        else:
            self.send((self.model / path.partition(f"/resolve/{COMMIT}/")[2]).read_bytes(), body)

    def files(self) -> list[dict[str, Any]]:
        return [{"rfilename": file.rfilename, "size": file.size} for file in siblings(self.model)]

    def tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": file.rfilename, "size": file.size, "oid": hashlib.sha1(b"").hexdigest()}
            for file in siblings(self.model)
        ]

    def send(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture(scope="module")
def endpoint(model: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Serving", (Hub,), {"model": model}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


ASK = """
import json, sys
from helios.errors import HeliosError
from helios.model.hub import resolve
for repo, revision in json.loads(sys.argv[1]):
    try:
        print(json.dumps(["ok", str(resolve(repo, revision=revision))]))
    except HeliosError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def ask(endpoint: str, home: Path, *repos: tuple[str, str | None]) -> list[tuple[str, str]]:
    """What ``resolve`` says in a process of its own, which reads the variables as a user's does."""
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), "")
    variables = os.environ | proxies | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    variables |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", ASK, json.dumps(repos)]
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return [tuple(json.loads(line)) for line in run.stdout.splitlines()]


def test_download_from_an_endpoint_and_what_it_refuses(endpoint: str, model: Path, tmp_path: Path) -> None:
    repos = [("owner/tiny", None), ("owner/tiny", None), ("gated/model", None), ("owner/nothing", None)]
    first, second, gated, unknown, revision = ask(endpoint, tmp_path, *repos, ("owner/tiny", "v9"))
    assert first[0] == "ok"
    assert second == first
    folder = Path(first[1])
    came = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert came == {str(path.relative_to(model)): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    assert gated[0] == "CheckpointError"
    assert "gated/model is gated" in gated[1]
    assert f"accept its terms at {endpoint}/gated/model" in gated[1]
    assert f"{endpoint} has no repository owner/nothing" in unknown[1]
    assert "owner/tiny has no revision 'v9'" in revision[1]


def test_a_hub_out_of_reach_falls_back_to_the_whole_copy(endpoint: str, tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"  # the discard port: refused at once
    lost = ask(nowhere, tmp_path, ("owner/tiny", None))[0]
    assert lost[0] == "CheckpointError"
    assert f"{nowhere} cannot be reached" in lost[1]
    assert "is not in the cache" in lost[1]
    assert ask(endpoint, tmp_path, ("owner/tiny", None))[0][0] == "ok"
    found = ask(nowhere, tmp_path, ("owner/tiny", None))[0]
    assert found[0] == "ok"
    (Path(found[1]) / "vae" / "config.json").unlink()
    half = ask(nowhere, tmp_path, ("owner/tiny", None))[0]
    assert "half downloaded: it lacks vae/config.json" in half[1]
