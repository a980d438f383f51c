"""What a model adds to transformers' reading and writing of files: folders are published whole."""

from __future__ import annotations

import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from omnimoe.publish import publish

_REPOSITORY = ("private", "repo_type", "space_sdk", "resource_group_id")
_UPLOAD = (*_REPOSITORY, "repo_id", "token", "commit_message", "commit_description", "revision", "create_pr")


class GuardedFiles(PreTrainedModel):
    """``save_pretrained`` of a :class:`~transformers.PreTrainedModel`, made safe."""

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers, but whole or not at all, with a manifest of hashes; other files in the folder stay.

        Args:
            save_directory: the folder.
            is_main_process: whether this process writes.
            state_dict: what to write in place of the model's own weights.
            push_to_hub: upload what was written to ``repo_id``, by default of the folder's name.
            kwargs: as in transformers: ``max_shard_size``, ``variant``, ``token`` and so on.

        Raises:
            OSError: with ``errno.ENOSPC`` if the disk is full; what the folder held is unchanged.
        """
        folder = Path(save_directory)
        if kwargs.get("distributed_checkpoint"):
            # every rank writes into it, at its own time
            super().save_pretrained(folder, is_main_process, state_dict, push_to_hub, **kwargs)
            return
        upload = {name: kwargs.pop(name) for name in _UPLOAD if name in kwargs}
        if not self.should_save_on_this_rank(is_main_process):
            with tempfile.TemporaryDirectory() as nowhere:
                super().save_pretrained(nowhere, is_main_process, state_dict, **kwargs)
        else:
            repo_id = self._repository(folder, upload) if push_to_hub else ""
            before = self._get_files_timestamps(folder) if folder.is_dir() else {}
            with publish(folder, needed=self._bytes_to_save(state_dict)) as fresh:
                super().save_pretrained(fresh, is_main_process, state_dict, **kwargs)
            if push_to_hub:
                self._upload_modified_files(folder, repo_id, before, **upload)
        self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))

    def _repository(self, folder: Path, upload: dict[str, Any]) -> str:
        """The repository to upload to, made where it is not there, before anything is written."""
        from huggingface_hub import create_repo

        asked = {name: upload.pop(name) for name in _REPOSITORY if name in upload}
        repo_id = upload.pop("repo_id", folder.absolute().name)
        return create_repo(repo_id, token=upload.get("token"), exist_ok=True, **asked).repo_id

    def _bytes_to_save(self, state_dict: dict[str, Tensor] | None) -> int:
        """What a save writes at least; 0 where adapters or a quantiser decide."""
        if getattr(self, "_hf_peft_config_loaded", False) or getattr(self, "hf_quantizer", None) is not None:
            return 0
        if state_dict is None:
            held = [*self.parameters(), *self.buffers()]
        else:
            held = list({(tensor.data_ptr(), tensor.shape): tensor for tensor in state_dict.values()}.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in held)
