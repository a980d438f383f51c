"""The cache of downloads, and whether what it holds is what the Hub holds."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from tests.hub.server import FakeHub, etag_of


def cache() -> Path:
    """The folder of all that was fetched, to be compared whole: with its refs, blobs and partial files."""
    return Path(constants.HF_HUB_CACHE)


def untrue(hub: FakeHub) -> list[str]:
    """Files of the cache that say what the Hub does not; also after a download that broke off there is none.

    That may leave whole files, and the beginning of one as ``.incomplete``. By itself huggingface_hub notes the commit
    of a branch in ``refs`` and its files in ``trees``, keeps empty locks, and marks the folder as a cache.
    """
    true = _what_is_true(hub)
    names = [path.relative_to(cache()).as_posix() for path in sorted(cache().rglob("*")) if not path.is_dir()]
    return [name for name in names if name != "CACHEDIR.TAG" and not _is_true(name, true)]


def _is_true(name: str, true: dict[str, bytes]) -> bool:
    path = cache() / name
    if not path.exists():  # a link that leads nowhere
        return False
    content = path.read_bytes()
    if path.suffix == ".incomplete":
        return true.get(f"{name.rpartition('/')[0]}/{path.name.partition('.')[0]}", b"").startswith(content)
    if "/trees/" in name:
        held = {file: told["blob_id"] for file, told in json.loads(content)["files"].items()}
        return json.dumps(held).encode() == true.get(name)
    return content == true.get(name)


def _what_is_true(hub: FakeHub) -> dict[str, bytes]:
    """Each file of a cache of everything; of ``trees`` the names and blobs."""
    true = {}
    for name, repository in hub.repositories.items():
        folder = repo_folder_name(repo_id=name, repo_type="model")
        for revision, commit in {**repository.requests, **repository.tags, **repository.branches}.items():
            true[f"{folder}/refs/{revision}"] = commit.encode()
        for commit, files in repository.commits.items():
            blobs = {path: etag_of(path, content) for path, content in files.items()}
            true[f"{folder}/trees/{commit}.json"] = json.dumps(blobs).encode()
            for path, content in files.items():
                true[f"{folder}/snapshots/{commit}/{path}"] = true[f"{folder}/blobs/{blobs[path]}"] = content
                true[f".locks/{folder}/{blobs[path]}.lock"] = b""
    return true
