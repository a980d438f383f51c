"""What the Hub refuses, and what to do about it, in one sentence."""

from __future__ import annotations

import contextlib
import difflib
import errno
from collections.abc import Iterator

from omnimoe.checkpoint.errors import CheckpointError

_LOG_IN = "log in with `hf auth login` or pass token="


@contextlib.contextmanager
def hub_errors(
    name: str, revision: str | None = None, *, token: str | bool | None = None, folder: str = ""
) -> Iterator[None]:
    """Turns what huggingface_hub raises into a :class:`CheckpointError` that says what to do.

    Args:
        name: id of the repository.
        revision: that was asked for.
        token: that it was asked with.
        folder: the folder that could have been meant; empty where none could.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    try:
        yield
    except (HTTPError, HFValidationError, OSError, RuntimeError) as error:
        told: Exception = error
        # that nothing is in the cache, or that an upload failed, says less than what the Hub answered
        if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
            told = error.__cause__
        elif isinstance(error, RuntimeError):
            if not isinstance(error.__cause__, HTTPError | OSError):
                raise
            told = error.__cause__
        meant = f"; nor is there a folder {folder!r}" if folder else ""
        raise CheckpointError(_sentence(told, name, revision, token, meant)) from error


def _sentence(error: Exception, name: str, revision: str | None, token: str | bool | None, meant: str) -> str:
    from huggingface_hub import constants, errors

    address = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, errors.GatedRepoError):
        return f"{name!r} is gated: ask for access at {address}, then {_LOG_IN} of an account that has it"
    if isinstance(error, errors.DisabledRepoError):
        return f"{name!r} was disabled by the Hub and cannot be read; {address} says why"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no repository {name!r} at {constants.ENDPOINT} that you may see{meant}; check the spelling, and "
            f"if it is private, {_LOG_IN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name!r} has no revision {revision!r}{_near_revisions(name, revision, token)}"
    if isinstance(error, errors.HfHubHTTPError):
        return _of_status(error, name, address, token)
    # older releases look no further than for the folder
    if isinstance(error, getattr(errors, "IncompleteSnapshotError", ())):
        return f"only a part of {name!r} is in the cache, and {_no_network(error)}; call again with network"
    if isinstance(error, errors.LocalEntryNotFoundError):
        at = f" at revision {revision!r}" if revision else ""
        return f"{name!r}{at} is not in the cache{meant}, and {_no_network(error)}; fetch it once with network"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"token=True asks for a stored token, and there is none; {_LOG_IN}"
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} is no id of the Hub: {error}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk of the cache is full, so {name!r} could not be fetched; free some space or pass cache_dir="
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return f"{name!r} cannot be kept in the cache: {error}; pass another folder as cache_dir="
    return (
        f"the transfer of {name!r} broke off: {error}. Call again: what is whole is kept, and nothing is read that "
        "is not"
    )


def _of_status(error: Exception, name: str, address: str, token: str | bool | None) -> str:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_token_to_send

    status = error.response.status_code  # type: ignore[attr-defined]
    said = getattr(error, "server_message", None) or str(error)
    if status == 401 and get_token_to_send(token) is None:
        return f"{constants.ENDPOINT} does this for {name!r} with a token alone, and there is none; {_LOG_IN}"
    if status == 401:
        return f"the token was refused by {constants.ENDPOINT}: {said}. Make a new one and {_LOG_IN}"
    if status == 403:
        return f"the token may not do this with {name!r}: {said}. Give it the right in the settings of {address}"
    if status == 429:
        return f"{constants.ENDPOINT} takes no more requests for now: {said}. Wait, or {_LOG_IN}"
    if status >= 500:
        return f"{constants.ENDPOINT} answered {status} for {name!r}: {said}. It is the Hub's own trouble; try later"
    return f"{constants.ENDPOINT} refused {name!r} with {status}: {said}"


def _no_network(error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids the network"
    if error.__cause__ is None:
        return "local_files_only=True forbids the network"
    return f"{constants.ENDPOINT} cannot be reached ({error.__cause__})"


def _near_revisions(name: str, revision: str | None, token: str | bool | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    held: list[str] = []
    # a hint only: where it cannot be had, the message does without
    with contextlib.suppress(HTTPError, OSError):
        refs = HfApi(token=token).list_repo_refs(name)
        held = [ref.name for ref in (*refs.branches, *refs.tags)]
    near = difflib.get_close_matches(str(revision), held, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{meant} It has {', '.join(held[:12])}" if held else "; see its branches and tags on its page"
