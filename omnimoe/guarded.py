"""What a model adds to transformers' reading and writing of files.

What is read is checked first, whichever class is asked for it, ``AutoModelForCausalLM`` too; what is written is
published whole. The reading and writing themselves are transformers'.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import tempfile
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from omnimoe.adapters import check_fit, find_adapters
from omnimoe.bars import bars_where_seen
from omnimoe.checkpoint import CheckpointError, check_weights, complaint
from omnimoe.checkpoint.errors import MisfitError, draws_undone
from omnimoe.checkpoint.fetch import check_name
from omnimoe.checkpoint.finite import check_choice
from omnimoe.checkpoint.finite import check_finite as look_for_nan
from omnimoe.checkpoint.fit import bytes_of, check_dtypes, layers_in, misfits, renamed
from omnimoe.checkpoint.folder import check_config, files_read, is_of_ranks, names_implementation
from omnimoe.checkpoint.header import Entry
from omnimoe.checkpoint.manifest import verify_folder
from omnimoe.checkpoint.memory import check_memory
from omnimoe.checkpoint.pickles import check_pickles
from omnimoe.checkpoint.route import (
    ADAPTERS,
    CONFIG_OF_ADAPTERS,
    find_folder,
    folder_of_adapters,
    is_pickle,
)
from omnimoe.config import ConfigError
from omnimoe.model_card import README, text_of, write_card
from omnimoe.publish import publish
from omnimoe.quantize import check_reach, matrices, named, stored_form
from omnimoe.registry import RegistryError
from omnimoe.upload import REPOSITORY, repository, upload_folder

_UPLOAD = (*REPOSITORY, "repo_id", "token", "commit_message", "commit_description", "revision", "create_pr")


class GuardedFiles(PreTrainedModel):
    """``from_pretrained`` and ``save_pretrained`` of a :class:`~transformers.PreTrainedModel`, made safe."""

    fresh_heads: ClassVar[tuple[str, ...]] = ()
    """Heads that start fresh on the weights of a model that has others: modules beside the base."""

    @classmethod
    @draws_undone()
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str] | None,
        *model_args: Any,
        config: Any = None,
        strict: bool | None = None,
        verify: bool = False,
        check_finite: str = "warn",
        check_size: bool = True,
        allow_pickle: bool = False,
        quantization_config: Any = None,
        allow_partial: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, after the checks that docs/checkpoints.md lists.

        Args:
            pretrained_model_name_or_path: a folder or an id on the Hub; None with ``state_dict``.
            model_args: for the class.
            config: in place of the folder's.
            strict: refuse a missing, an unexpected or a misshapen weight. Where None, this is done unless
                ``output_loading_info`` or ``ignore_mismatched_sizes`` says that the caller looks for himself.
            verify: compare every file with the hashes of the folder's manifest.
            check_finite: ``"warn"``, ``"error"`` or ``"off"`` for weights that are NaN or infinite.
            check_size: refuse a model larger than the memory that is free.
            allow_pickle: read pytorch_model.bin where there is no other file, without running code of it.
            quantization_config: of transformers, or ``"int8"``: torchao's int8 weights for every bank.
            allow_partial: let a quantisation leave some of the layers' weights as they are.
            kwargs: as in transformers.

        Returns:
            The model, with ``output_loading_info`` the report too.

        Raises:
            CheckpointError: if the checkpoint is missing, malformed, unsafe, or does not fit.
            QuantizationError: if weights of the layers would stay as they are.
        """
        check_choice(check_finite)
        if quantization_config is not None:
            is_named = isinstance(quantization_config, str)
            kwargs["quantization_config"] = named(quantization_config) if is_named else quantization_config
        if pretrained_model_name_or_path is not None or kwargs.get("state_dict") is None:
            check_name(pretrained_model_name_or_path)
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        wants_report = kwargs.pop("output_loading_info", False)
        if strict is None:
            strict = not (wants_report or kwargs.get("ignore_mismatched_sizes"))
        folder, kwargs = find_folder(pretrained_model_name_or_path, kwargs)
        from_pickle = is_pickle(folder, allow_pickle, kwargs)
        if config is None or (folder / "config.json").exists():
            check_config(folder)
        if not isinstance(config, PreTrainedConfig):
            if config is not None:
                check_config(find_folder(config, {})[0])
            own = {"num_labels", *(spec.name for spec in dataclasses.fields(cls.config_class))}
            changes = {name: kwargs.pop(name) for name in own & kwargs.keys() - {"dtype"}}
            config = cls.config_class.from_pretrained(folder if config is None else config, **changes)
        if verify:
            cls._verify(folder, folder_of_adapters(folder, kwargs), kwargs.get("variant"), from_pickle)
        entries = check_pickles(folder) if from_pickle else check_weights(folder, variant=kwargs.get("variant"))
        quantisation = getattr(config, "quantization_config", None)
        is_quantised = quantisation is not None
        model = cls._on_meta(config, model_args, entries if strict else {}, folder)
        held = renamed(entries, model.state_dict().keys(), cls.base_model_prefix)
        swapped = cls._swapped_heads(held)
        if check_size and not _is_spread(kwargs) and kwargs.get("quantization_config") is None:
            needed = sum(entry.size for entry in entries.values()) if is_quantised else 0
            check_memory(needed or bytes_of(model, _dtype(config, kwargs), held), fspath(folder / "config.json"))
        # where names of the file are not the model's, only transformers can tell what fits
        if not (is_of_ranks(folder) or kwargs.get("key_mapping")):
            tied, beside = getattr(model, "all_tied_weights_keys", None), [*_of_the_library(model), *swapped]
            held, wanted = cls._comparable(model, quantisation, held)
            misfit = misfits(held, wanted, tied, beside) if strict else ""
            if misfit:
                raise _does_not_fit(folder, cls.__name__, misfit)
            check_dtypes(held, wanted, **({"remedy": "no quantisation makes these"} if is_quantised else {}))
        kwargs |= {"use_safetensors": not from_pickle, "weights_only": True, "trust_remote_code": False}
        if not strict or is_quantised:
            # transformers names no weight in what it raises, and the report does
            kwargs["ignore_mismatched_sizes"] = True
        try:
            model, report = super().from_pretrained(
                fspath(folder), *model_args, config=config, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise CheckpointError(f"the weights in {folder} cannot be read: {error}") from error
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
            if not is_quantised or isinstance(error, CheckpointError | ConfigError | torch.OutOfMemoryError):
                raise
            raise CheckpointError(
                f"the quantised weights in {folder} cannot be put together: {error!r}; load them with the "
                "class that they were saved from, or save the model again"
            ) from error
        missing = [name for name in report["missing_keys"] if name.partition(".")[0] not in swapped]
        unexpected = report["unexpected_keys"] if is_quantised else ()
        misfit = complaint({**report, "missing_keys": missing, "unexpected_keys": unexpected})
        if strict and misfit:
            raise _does_not_fit(folder, cls.__name__, misfit)
        look_for_nan(model, check_finite, folder)
        if not Path(pretrained_model_name_or_path).is_dir():
            # adapters write down what they are for: the id, not where the cache keeps it
            model.name_or_path = model.config.name_or_path = fspath(pretrained_model_name_or_path)
        if (is_quantised or quantization_config is not None) and not allow_partial:
            check_reach(model)
        return (model, report) if wants_report else model

    @staticmethod
    def _comparable(
        model: PreTrainedModel, quantisation: Any, held: dict[str, Entry]
    ) -> tuple[dict[str, Entry], dict[str, Tensor]]:
        """Weights of a file and those that it should hold, of both what can be compared before it is read.

        Args:
            model: without memory.
            quantisation: of the config; None where the weights are plain.
            held: as declared, under the model's names.
        """
        wanted = model.state_dict()
        if quantisation is None:
            return held, wanted
        stored = stored_form(copy.deepcopy(model), quantisation, held)
        if stored is not None:
            return held, stored
        # the quantiser alone knows how it stores what it quantised
        banks = {name for name, _, _ in matrices(model)}
        wanted = {name: weight for name, weight in wanted.items() if name not in banks}
        return {name: entry for name, entry in held.items() if name in wanted}, wanted

    @classmethod
    def _swapped_heads(cls, held: Mapping[str, Entry]) -> set[str]:
        """Heads of this class that weights have none of, and those that they have in their place."""
        parts = {name.partition(".")[0] for name in held} - {cls.base_model_prefix}
        return set() if parts & {*cls.fresh_heads} or not cls.fresh_heads else parts | {*cls.fresh_heads}

    @staticmethod
    def _verify(folder: Path, adapters: Path | None, variant: str | None, from_pickle: bool) -> None:
        """Compares what will be loaded with the manifests, of adapters too."""
        needed = files_read(folder, variant=variant, from_pickle=from_pickle)
        of_adapters = {ADAPTERS, CONFIG_OF_ADAPTERS}
        if adapters is not None and adapters != folder:
            verify_folder(adapters, needed=of_adapters)
        verify_folder(folder, needed=needed | of_adapters if adapters == folder else needed)

    @classmethod
    def _on_meta(
        cls, config: PreTrainedConfig, model_args: tuple[Any, ...], entries: Mapping[str, Entry], folder: Path
    ) -> PreTrainedModel:
        """The model without memory.

        Args:
            config: of the model.
            model_args: for the class.
            entries: weights whose number of layers must be that of the config.
            folder: for messages.
        """
        layers = layers_in(entries, "backbone")
        if layers and layers != config.num_layers:
            raise _does_not_fit(
                folder, cls.__name__, f"config.json declares {config.num_layers} layers, the weights are of {layers}"
            )
        try:
            with torch.device("meta"):
                return cls(copy.deepcopy(config), *model_args)
        except (ConfigError, CheckpointError):
            raise
        except (RuntimeError, ValueError) as error:
            # what the caller asks for is no fault of the file
            if isinstance(error, RegistryError) and not names_implementation(folder):
                raise
            raise CheckpointError(
                f"{folder / 'config.json'} describes a model that cannot be built: {error}; fetch or save it again"
            ) from error

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
            ValueError: if no folder is named, or the weights have no numbers.
        """
        if not isinstance(save_directory, str | PathLike) or not fspath(save_directory):
            raise ValueError(f"save_directory must be a folder, got {save_directory!r}; '.' is the current one")
        if state_dict is None and not hasattr(self, "hf_device_map"):  # which may keep weights elsewhere meanwhile
            self._check_numbers()
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
            repo_id = repository(upload.pop("repo_id", folder.absolute().name), upload) if push_to_hub else ""
            with publish(folder, needed=self._bytes_to_save(state_dict)) as fresh, bars_where_seen():
                super().save_pretrained(fresh, is_main_process, state_dict, **kwargs)
                if not getattr(self, "_hf_peft_config_loaded", False):
                    write_card(self, fresh, name=repo_id or folder.absolute().name, held=text_of(folder / README))
            if push_to_hub:
                upload_folder(folder, repo_id, **upload)
        self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))

    def load_adapter(self, peft_model_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; adapters are checked first, those on the Hub too.

        Args:
            peft_model_id: a folder or an id on the Hub; None with ``peft_config`` and ``adapter_state_dict``.
            args: as in transformers.
            kwargs: as in transformers; ``adapter_kwargs`` say how the Hub is asked. ``ignore_mismatched_sizes=True``
                loads what fits.

        Returns:
            transformers' report.

        Raises:
            CheckpointError: if the adapters are missing, malformed, a pickle or another model's, or their config asks
                for what PEFT cannot do; the model is unchanged where they do not fit.
        """
        bound = inspect.signature(super().load_adapter).bind(peft_model_id, *args, **kwargs)
        given = bound.arguments
        if peft_model_id is None or given.get("adapter_state_dict") is not None:
            return super().load_adapter(peft_model_id, *args, **kwargs)
        folder, given["adapter_kwargs"] = find_adapters(peft_model_id, given)
        given |= {"peft_model_id": fspath(folder), "local_files_only": False}
        lenient = getattr(given.get("load_config"), "ignore_mismatched_sizes", False)
        try:
            if not (lenient or kwargs.get("ignore_mismatched_sizes")):
                check_fit(self, folder)
            return super().load_adapter(*bound.args, **bound.kwargs)
        except CheckpointError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(
                f"the adapters that {folder / CONFIG_OF_ADAPTERS} describes cannot be loaded: {error!r}"
            ) from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "5GB",
        tags: str | list[str] | None = None,
    ) -> str:
        """Saves the model into a repository on the Hub; weights of an earlier push are replaced, other files stay.

        Args:
            repo_id: ``org/name``, or ``name`` for your own; made if it is not there.
            commit_message: of the commit.
            commit_description: of the commit.
            private: whether a repository that is made is private; as its owner has set where None.
            token: that may write; that of ``hf auth login`` where None.
            revision: branch, made if it is not there.
            create_pr: open a pull request in place of a commit.
            max_shard_size: bytes of the largest file.
            tags: for the card, beside its own.

        Returns:
            Address of the commit; its ``pr_url`` is that of the pull request.

        Raises:
            CheckpointError: if the Hub refuses, with what to do; nothing is changed then.
        """
        repo_id = repository(repo_id, {"private": private, "token": token, "revision": revision})
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            if not getattr(self, "_hf_peft_config_loaded", False):
                write_card(self, Path(folder), name=repo_id, tags=[tags] if isinstance(tags, str) else tags or ())
            return upload_folder(
                Path(folder),
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def _check_numbers(self) -> None:
        """Refuses weights on the meta device."""
        held = [name for name, tensor in self.named_parameters() if tensor.is_meta]
        if held:
            raise ValueError(
                f"{len(held):,} weights of this {type(self).__name__} are on the meta device, {held[0]} for one, and "
                "have no numbers to save; build or load it without device='meta'"
            )

    def _bytes_to_save(self, state_dict: dict[str, Tensor] | None) -> int:
        """What a save writes at least; 0 where adapters or a quantiser decide."""
        if getattr(self, "_hf_peft_config_loaded", False) or getattr(self, "hf_quantizer", None) is not None:
            return 0
        if state_dict is None:
            held = [*self.parameters(), *self.buffers()]
        else:
            held = list({(tensor.data_ptr(), tensor.shape): tensor for tensor in state_dict.values()}.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _dtype(config: PreTrainedConfig, kwargs: Mapping[str, Any]) -> torch.dtype | None:
    """Of the loaded weights; None where it is the file's."""
    asked = kwargs.get("dtype", kwargs.get("torch_dtype"))
    asked = config.dtype if asked is None or asked == "auto" else asked
    asked = getattr(torch, asked, None) if isinstance(asked, str) else asked
    return asked if isinstance(asked, torch.dtype) else None


def _is_spread(kwargs: Mapping[str, Any]) -> bool:
    """Whether the weights go elsewhere than into the memory of this process alone."""
    spread = ("distributed_config", "tp_plan", "tp_size", "device_mesh")
    on_cpu = kwargs.get("device_map") in (None, "cpu") and torch.get_default_device().type == "cpu"
    return not on_cpu or any(kwargs.get(name) is not None for name in spread)


def _does_not_fit(folder: Path, model: str, misfit: str) -> MisfitError:
    return MisfitError(f"the weights in {folder} do not fit {model}.\n{misfit}\nstrict=False loads the rest")


def _of_the_library(model: PreTrainedModel) -> list[str]:
    """Models of transformers inside of ours, such as encoders: it writes some under the names of old releases."""
    return [
        name
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel) and not isinstance(module, GuardedFiles)
    ]
