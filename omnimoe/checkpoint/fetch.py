"""Where a checkpoint lies, and the files of it that are needed: in a folder of the disk, or fetched from the Hub.

Downloading, the cache and the rules for working offline are huggingface_hub's. What is added here: only files that will
be read are fetched, all of one commit, and every failure says what to do.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from omnimoe.bars import bars_where_seen
from omnimoe.checkpoint.errors import CheckpointError
from omnimoe.checkpoint.folder import end_broken_save
from omnimoe.checkpoint.refusals import hub_errors

logger = logging.getLogger(__name__)

TEXTS = ("*.json", "README.md")
"""Files of a checkpoint beside its weights."""
PREFIXES = ("hf-hub:", "local-dir:")
"""What says whether a name is an id on the Hub or a folder; without one, an existing folder wins."""


@dataclass(frozen=True, kw_only=True)
class Hub:
    """How the Hub is asked: the arguments of the same names of ``huggingface_hub.snapshot_download``.

    Args:
        revision: branch, tag or commit.
        cache_dir: of downloads; huggingface_hub's own where None.
        token: for what is private or gated; that of ``hf auth login`` where None, none at all where False.
        local_files_only: look in the cache alone.
        force_download: fetch again what is in the cache.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False

    def __post_init__(self) -> None:
        # an empty variable of the environment gives an empty string, which the client takes for a name
        if self.revision is not None and not _is_text(self.revision):
            raise CheckpointError(
                f"revision must be a branch, a tag or a commit, got {self.revision!r}; leave it out for the main branch"
            )
        if not isinstance(self.token, bool | None) and not _is_text(self.token):
            raise CheckpointError(
                "token must be a token of the Hub, and is empty or no text; leave it out for the one that "
                "`hf auth login` stored, or pass False for none"
            )
        if self.cache_dir is not None and not isinstance(self.cache_dir, PathLike) and not _is_text(self.cache_dir):
            raise CheckpointError(f"cache_dir must be a folder, got {self.cache_dir!r}; leave it out for the usual one")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A place that holds a checkpoint.

    Args:
        name: the folder, or the id on the Hub.
        is_folder: whether it is a folder of the disk.
        subfolder: of the folder or the repository; empty for none.
        hub: how the Hub is asked.
        is_bare: whether it was named without ``hf-hub:`` or ``local-dir:``.
    """

    name: str
    is_folder: bool
    subfolder: str = ""
    hub: Hub = Hub()
    is_bare: bool = True

    @classmethod
    def find(
        cls, source: str | PathLike[str], *, subfolder: str | None = "", hub: Hub = Hub(), hint: str = ""
    ) -> Source:
        """What ``source`` names: an existing folder wins over an id on the Hub.

        Args:
            source: an existing folder, ``local-dir:folder``, ``org/name`` or ``hf-hub:org/name``.
            subfolder: where in it the checkpoint lies.
            hub: how the Hub is asked.
            hint: the tail of a message about a name that is neither.

        Raises:
            CheckpointError: if it names nothing, or a revision is asked of a folder.
        """
        check_name(source)
        given, subfolder = fspath(source), subfolder or ""
        prefix = next((start for start in PREFIXES if given.startswith(start)), "")
        rest = given.removeprefix(prefix)
        _check_subfolder(subfolder)
        folder = Path(rest).expanduser()
        if prefix == "local-dir:" or (not prefix and (folder.is_dir() or isinstance(source, PathLike))):
            if not folder.is_dir():
                raise CheckpointError(f"there is no folder {fspath(folder)!r}; name the folder of a saved model")
            if hub.revision is not None:
                raise CheckpointError(
                    f"{given!r} is a folder, which has no revision {hub.revision!r}; leave revision out, or write "
                    f"'hf-hub:{rest}' for the repository of that name"
                )
            _say_which(rest, folder, hub)
            return cls(name=fspath(folder), is_folder=True, subfolder=subfolder, hub=hub, is_bare=not prefix)
        if not _is_id(rest):
            hint = _meant(given, folder) or hint
            raise CheckpointError(f"{given!r} is neither an existing folder nor an id on the Hub (org/name){hint}")
        return cls(name=rest, is_folder=False, subfolder=subfolder, hub=hub, is_bare=not prefix)

    def fetch(self, files: Sequence[str] = TEXTS, *, at: Path | None = None) -> Path:
        """The folder with these files in it, fetched where they are not there.

        Args:
            files: names, or patterns with ``*``, which reach into folders only where one of them names a folder.
            at: the folder that another call returned, so that all files are of its commit.

        Raises:
            CheckpointError: if the checkpoint, or a file that is named in full, is missing or cannot be had.
        """
        root = Path(self.name) if self.is_folder else self._snapshot(files, at)
        folder = root / self.subfolder
        if not folder.is_dir():
            raise CheckpointError(f"{self.name!r} has no folder {self.subfolder!r}; leave subfolder out or correct it")
        if self.is_folder:
            end_broken_save(folder)
        required = [name for name in files if name not in TEXTS and not re.search(r"[*?\[]", name)]
        missing = [name for name in required if not (folder / name).is_file()]
        if missing and not self.is_folder:
            raise self._without(missing)
        return folder

    def fetch_header(self, file: str, *, at: Path) -> dict[str, Any]:
        """The header of a safetensors file on the Hub, of which nothing else is fetched.

        Args:
            file: its name.
            at: the folder that :meth:`fetch` returned, so that it is of the same commit.

        Returns:
            What the header holds: ``dtype``, ``shape`` and ``data_offsets`` by the tensor's name, and
            ``__metadata__``.

        Raises:
            CheckpointError: if the file is missing, cannot be had, or is no safetensors file.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import EntryNotFoundError, SafetensorsParsingError

        name = f"{self.subfolder}/{file}" if self.subfolder else file
        commit = _root(at, self.subfolder).name
        with hub_errors(self.name, self.hub.revision, token=self.hub.token):
            try:
                found = HfApi(token=self.hub.token).parse_safetensors_file_metadata(self.name, name, revision=commit)
            except EntryNotFoundError as error:
                raise self._without([name]) from error
            except SafetensorsParsingError as error:
                raise CheckpointError(f"{name} of {self.name!r} is no safetensors file: {error}") from error
        tensors = {
            key: {"dtype": held.dtype, "shape": held.shape, "data_offsets": held.data_offsets}
            for key, held in found.tensors.items()
        }
        return {"__metadata__": found.metadata, **tensors}

    def _without(self, files: Sequence[str]) -> CheckpointError:
        return CheckpointError(
            f"{self.name!r} has no {', '.join(files)} {self._where()}: the upload is not whole, or its "
            "weights are pickles, which are not read; ask its owner for safetensors, or pass another revision"
        )

    def _snapshot(self, files: Sequence[str], at: Path | None) -> Path:
        from huggingface_hub import snapshot_download

        inside = f"{self.subfolder}/" if self.subfolder else ""
        # with a commit nothing is asked of the Hub that is in the cache
        revision = self.hub.revision if at is None else _root(at, self.subfolder).name
        is_first = at is None and not self.is_in_cache()
        meant = self.name if self.is_bare else ""
        with bars_where_seen(), hub_errors(self.name, self.hub.revision, token=self.hub.token, folder=meant):
            folder = snapshot_download(
                self.name,
                revision=revision,
                cache_dir=self.hub.cache_dir,
                token=self.hub.token,
                local_files_only=self.hub.local_files_only,
                force_download=self.hub.force_download,
                allow_patterns=[inside + name for name in files],
                ignore_patterns=None if any("/" in name for name in files) else [f"{inside}*/*"],
            )
            if is_first:
                self._say_if_renamed()
        return Path(folder)

    @property
    def may_ask(self) -> bool:
        """Whether it lies on the Hub and the Hub may be asked for it."""
        from huggingface_hub import constants

        return not (self.is_folder or self.hub.local_files_only or constants.HF_HUB_OFFLINE)

    def is_in_cache(self) -> bool:
        """Whether anything of the repository was fetched before; not so where the name is none of the Hub."""
        from huggingface_hub import constants
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.file_download import repo_folder_name

        cache = Path(self.hub.cache_dir or constants.HF_HUB_CACHE).expanduser()
        try:
            # a refused fetch leaves a folder too, without this one
            return (cache / repo_folder_name(repo_id=self.name, repo_type="model") / "snapshots").is_dir()
        except HFValidationError:
            return False

    def _say_if_renamed(self) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError

        now = self.name
        # all that is needed is there by now; a Hub that does not answer this takes nothing away
        with contextlib.suppress(HTTPError, OSError):
            now = HfApi(token=self.hub.token).model_info(self.name).id
        if now != self.name:
            logger.warning(
                "%r is now called %r on the Hub; write that name, the old one may be given away", self.name, now
            )

    def _where(self) -> str:
        within = f"in {self.subfolder!r} " if self.subfolder else ""
        return f"{within}at revision {self.hub.revision or 'main'!r}"


def check_name(source: object) -> None:
    """Refuses what names nothing, before the current folder is taken for it.

    Raises:
        CheckpointError: with what was passed.
    """
    is_path = isinstance(source, PathLike)
    if not is_path and not (isinstance(source, str) and source not in PREFIXES and _is_text(source)):
        raise CheckpointError(
            f"{source!r} names no model; pass a folder or an id on the Hub (org/name), or a name of list_models() to "
            "load()"
        )


def weight_files(index: dict[str, str] | None, keys: Collection[str] | None = None) -> list[str]:
    """The files that hold weights.

    Args:
        index: the file of each key; None for a checkpoint of one file.
        keys: the weights that are wanted; all of them where None.
    """
    if index is None:
        return ["model.safetensors"]
    return sorted({file for key, file in index.items() if keys is None or key in keys})


def _is_text(given: object) -> bool:
    return isinstance(given, str) and bool(given.strip())


def _meant(given: str, folder: Path) -> str:
    """What a name is that is near to a right one, as the end of a message; empty for others."""
    if folder.is_file():
        return f"; it is a file, so pass its folder, {fspath(folder.parent)!r}"
    address = re.match(r"https?://[^/]+/([\w.\-]+/[\w.\-]+)", given)
    if address:
        return f"; it is an address of the web, so pass the id, {address[1]!r}"
    at = re.fullmatch(r"([\w.\-]+/[\w.\-]+)@([\w.\-/]+)", given)
    return f"; pass {at[1]!r} with revision={at[2]!r}" if at else ""


def _is_id(name: str) -> bool:
    return re.fullmatch(r"[\w.\-]+/[\w.\-]+", name) is not None and not name.startswith(("./", "../"))


def _check_subfolder(subfolder: str) -> None:
    if subfolder and not all(re.fullmatch(r"(?!\.{1,2}$)[\w.\-]+", part) for part in subfolder.split("/")):
        raise CheckpointError(f"subfolder {subfolder!r} must be a path inside, such as 'step-100' or 'a/b'")


def _root(folder: Path, subfolder: str) -> Path:
    return folder if not subfolder else folder.parents[len(Path(subfolder).parts) - 1]


def _say_which(name: str, folder: Path, hub: Hub) -> None:
    if not _is_id(name):
        return
    if Source(name=name, is_folder=False, hub=hub).is_in_cache():
        logger.warning(
            "%r is a folder here and a repository that was fetched before: the folder is read. Write 'hf-hub:%s' or "
            "'local-dir:%s' to say which is meant",
            *(name, name, name),
        )
    else:
        logger.info("%r is read from the folder %s, not from the Hub", name, folder.resolve())
