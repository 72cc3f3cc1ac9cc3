"""From a path or a repository id to a model folder on this disk.

The network and its cache are huggingface_hub's: ``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_OFFLINE`` and ``HF_TOKEN`` mean
what they mean there. Here stands what can go wrong on the way, each with one thing to do.
"""

from __future__ import annotations

import difflib
import errno
import fnmatch
import re
import shutil
from pathlib import Path
from typing import Any

from helios.errors import CheckpointError, InputError, StorageError
from helios.model.folder import missing_files

__all__ = ["WANTED", "resolve"]

# The parts of a published repository that a run reads. Intermediate transformers of the training lie beside them in
# folders of their own, tens of gigabytes each, and are not wanted.
WANTED = [
    "model_index.json",
    *(f"{name}/*.{end}" for name in ("transformer", "vae", "text_encoder") for end in ("json", "safetensors")),
    *(f"tokenizer/*.{end}" for end in ("json", "model", "txt")),
    "scheduler/*.json",
]


def resolve(path_or_repo: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a model: a path that exists, or a hub repository, downloaded or found in the cache.

    Args:
        path_or_repo: a folder, or an id such as ``"owner/name"``. An existing folder wins over a repository.
        revision: branch, tag or commit of a repository.

    Raises:
        InputError: a revision was given for a folder.
        CheckpointError: no such folder or repository; it is gated; the hub is out of reach and the cache lacks it or
            holds only a part.
        StorageError: the disk has too little room for the download.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        if revision is not None:
            raise InputError(f"{path} is a folder and has no revision {revision!r}", "leave the revision out")
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file, wanted a model folder", f"give its folder, {path.parent}")
    if isinstance(path_or_repo, Path) or _looks_like_path(path_or_repo):
        raise CheckpointError(f"there is no folder {path}", _nearest(path))
    return _from_hub(path_or_repo, revision)


def _looks_like_path(text: str) -> bool:
    """Anything but owner/name, and also owner/name where a folder "owner" is at hand: that is a misspelt path."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text) is None or Path(text).parent.is_dir()


def _nearest(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    siblings = sorted(child.name for child in parent.iterdir() if child.is_dir())
    near = difflib.get_close_matches(path.name, siblings, n=3)
    if near:
        return f"did you mean {' or '.join(str(parent / name) for name in near)}?"
    return (
        f"give a folder that exists, or a repository as owner/name; {parent} holds {', '.join(siblings[:5]) or 'none'}"
    )


def _from_hub(repo: str, revision: str | None) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return _from_cache(repo, revision, "HF_HUB_OFFLINE is set")
    try:
        _require_room(repo, revision)
        folder = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=WANTED))
    except errors.GatedRepoError as error:  # a kind of RepositoryNotFoundError, so it comes first
        page = f"{constants.ENDPOINT}/{repo}"
        fix = f"accept its terms at {page}, then: hf auth login"
        raise CheckpointError(f"{repo} is gated: its owner wants to know who downloads it", fix) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{constants.ENDPOINT} has no repository {repo}, or it is private",
            "check the name; if it is private: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r}", "leave the revision out for main") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repo} is no repository id: {error}", "give it as owner/name") from error
    except StorageError:
        raise
    except _unreachable() as error:
        if getattr(error, "errno", None) in _DISK:
            raise StorageError(f"{constants.HF_HUB_CACHE} cannot be written: {error}", _ELSEWHERE) from error
        return _from_cache(repo, revision, f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})")
    missing = missing_files(folder)
    if missing:
        raise CheckpointError(
            f"{repo} is not a complete Helios model: it lacks {', '.join(missing[:5])}", "use another"
        )
    return folder


def _unreachable() -> tuple[type[BaseException], ...]:
    """What the hub's client raises without a network: its HTTP library's base error, which changed between releases."""
    from huggingface_hub import errors

    return (*errors.HfHubHTTPError.__bases__, errors.HfHubHTTPError, OSError)


def _from_cache(repo: str, revision: str | None, why: str) -> Path:
    """The cached copy, if it is whole."""
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    at = f" --revision {revision}" if revision else ""
    cached: str | None
    try:
        cached = hub.snapshot_download(repo, revision=revision, allow_patterns=WANTED, local_files_only=True)
    except errors.LocalEntryNotFoundError as error:
        cached = getattr(error, "snapshot_path", None)  # set where a part of it is there
        if cached is None:
            raise CheckpointError(
                f"{why}, and {repo} is not in the cache {constants.HF_HUB_CACHE}",
                f"where there is a network: HF_HUB_OFFLINE=0 hf download {repo}{at}",
            ) from error
    folder = Path(cached)
    missing = missing_files(folder)
    if missing:
        includes = " ".join(f"--include '{pattern}'" for pattern in WANTED)
        raise CheckpointError(
            f"{why}, and the cached copy of {repo} is half downloaded: it lacks {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
            f"HF_HUB_OFFLINE=0 hf download {repo}{at} {includes}",
        )
    return folder


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_ELSEWHERE = "free some room, or put the cache on a larger disk: export HF_HOME=/path/with/room"


def _require_room(repo: str, revision: str | None) -> None:
    """Compare what is still to download with the room on the cache's disk, before the first byte."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    needed = sum(_size_to_download(repo, info.sha, file) for file in info.siblings or [])
    cache = Path(constants.HF_HUB_CACHE)
    disk = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise StorageError(
            f"{repo} needs {needed / 1e9:.1f} GB in {cache}, the disk has {free / 1e9:.1f} GB free", _ELSEWHERE
        )


def _size_to_download(repo: str, commit: str | None, file: Any) -> int:
    import huggingface_hub as hub

    wanted = any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in WANTED)
    if not wanted or isinstance(hub.try_to_load_from_cache(repo, file.rfilename, revision=commit), str):
        return 0
    return int(file.size or 0)
