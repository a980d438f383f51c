"""Saved models on their way to the Hub: one commit, without weights of an earlier push that would contradict it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnimoe.bars import bars_where_seen
from omnimoe.checkpoint import CheckpointError, Hub
from omnimoe.checkpoint.refusals import hub_errors
from omnimoe.model_card import README, is_ours, text_of
from omnimoe.publish import MANIFEST, family_of, read_manifest

REPOSITORY = ("private", "repo_type", "space_sdk", "resource_group_id")
"""Arguments of ``huggingface_hub.create_repo`` that saving passes on."""


def repository(name: str, asked: Mapping[str, Any]) -> str:
    """The full id of a repository, which is made where it is not there.

    Args:
        name: ``org/name`` or ``name``.
        asked: how to make it: :data:`REPOSITORY` and ``token``, and ``revision``, what will be written to, which is
            only looked at; anything else is left alone.

    Raises:
        CheckpointError: if the Hub refuses, or a name is none.
    """
    from huggingface_hub import HfApi

    if not isinstance(name, str) or not name.strip():
        raise CheckpointError(f"{name!r} names no repository of the Hub; write 'org/name', or 'name' for your own")
    token = asked.get("token")
    Hub(revision=asked.get("revision"), token=token)
    with hub_errors(name, token=token):
        given = {field: asked[field] for field in REPOSITORY if asked.get(field) is not None}
        return HfApi(token=token).create_repo(name, exist_ok=True, **given).repo_id


def upload_folder(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    **made: Any,
) -> str:
    """Uploads a saved model as one commit: the files that its manifest lists, and its card.

    Weights that the repository holds from an earlier push go with it, one file or shards; a README that somebody wrote
    there by hand stays.

    Args:
        folder: of the saved model.
        repo_id: of a repository that is there.
        token: that may write.
        revision: branch, made if it is not there.
        create_pr: open a pull request in place of a commit.
        commit_message: of the commit.
        commit_description: of the commit.
        made: how the repository was made; not needed here.

    Returns:
        Address of the commit, a :class:`huggingface_hub.CommitInfo`.

    Raises:
        CheckpointError: if the Hub refuses; nothing is changed then.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    with bars_where_seen(), hub_errors(repo_id, revision, token=token):
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        held = [name for name in api.list_repo_files(repo_id, revision=revision) if "/" not in name]
        saved = [*read_manifest(folder), MANIFEST, README]
        files = {name: folder / name for name in saved if (folder / name).is_file()}
        if README in held and README in files and not is_ours(_readme(repo_id, revision, token)):
            del files[README]
        families = {family_of(name) for name in files} - {None}
        stale = [name for name in held if name not in files and family_of(name) in families]
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        commit = api.create_commit(
            repo_id,
            [*operations, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return commit


def _readme(repo_id: str, revision: str | None, token: str | bool | None) -> str | None:
    from huggingface_hub import hf_hub_download

    return text_of(Path(hf_hub_download(repo_id, README, revision=revision, token=token)))
