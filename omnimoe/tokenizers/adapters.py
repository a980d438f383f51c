"""What the adapters of published tokenizers share: loading the library's own class, guards, saving.

An adapter adds nothing to the model that it adapts: ids and latents are those of the library's class, computed in
float32. The model comes from a local folder or the Hub; weights are read from safetensors files alone, and no code of a
checkpoint is run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from omnimoe.config import Config
from omnimoe.tokenizers.base import Tokenizer, TokenizerError


class AdapterTokenizer(Tokenizer):
    """A tokenizer around a model of another library, kept in :attr:`model` (in eval mode, without gradients)."""

    library_class: ClassVar[str]
    """Name of the class that is adapted, for loading and for messages."""

    model: Any

    def __init__(self, config: Config, *, model: Any) -> None:
        super().__init__(config)
        self.model = model.float().eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the model computes; what comes out is always on the CPU."""
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Moves the model to ``device`` and returns the tokenizer."""
        self.model.to(device)
        return self

    @classmethod
    def load_model(cls, source: str) -> nn.Module:
        """The library's model from a local folder or a Hub id; subclasses choose the library."""
        return load_transformers(cls.library_class, source)

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str] | None = None, **options: Any) -> Self:
        """Reads a published model, or a folder written by :meth:`save_pretrained`.

        Args:
            path: a folder in the library's own format, a Hub id, or a folder of :meth:`save_pretrained`.
            options: fields of the config; over those that were saved.

        Raises:
            TokenizerError: if there is no such model, it is of another class, weights are missing, or the library that
                has the class is not installed.
            ConfigError: if an option does not exist or does not fit the model.
        """
        if path is None:
            raise TokenizerError(
                f"no weights of {cls.registered_name!r} ship with the package; pass the folder or the Hub id of a "
                f"{cls.library_class}"
            )
        folder, name = Path(path).expanduser(), f"{cls.registered_name}_tokenizer"
        config, source = cls.Config(), str(path)
        if (folder / f"{name}.json").is_file():
            config, source = read_config(cls, folder / f"{name}.json"), str(folder / name)
        elif folder.exists():
            source = str(folder)
        elif not isinstance(path, str) or source.startswith((".", "/", "~", os.sep)):
            raise TokenizerError(f"no {cls.library_class} at {path}; pass its folder, or a Hub id such as 'org/name'")
        return cls(config.replace(**options), model=cls.load_model(source))

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Writes the config and, in a folder beside it, the model in the format of its library.

        Args:
            path: a folder, made if need be; everything in it is called ``<registered name>_tokenizer``.
        """
        name = f"{self.registered_name}_tokenizer"
        folder = Path(path).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with quiet_transformers():
            self.model.save_pretrained(folder / name)
        write_config(self.config, folder / f"{name}.json")


def load_transformers(class_name: str, source: str) -> nn.Module:
    """A model of transformers, in float32, from its own folder or from that of a model it is a part of.

    Args:
        class_name: ``"JanusVQVAE"``.
        source: a folder or a Hub id. A whole model that has the part as its ``vqmodel`` will do.

    Raises:
        TokenizerError: if it cannot be read, or weights of the class are missing there.
    """
    import transformers

    with quiet_transformers():
        try:
            model, report = getattr(transformers, class_name).from_pretrained(
                source,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                key_mapping={r"^(model\.)?vqmodel\.": ""},
            )
        except Exception as error:  # whatever a wrong folder makes the library raise
            raise TokenizerError(f"{source} cannot be read as {class_name}: {error}") from error
    check_loaded(report, class_name, source)
    return model


def check_loaded(report: dict[str, Any], class_name: str, source: str) -> None:
    """Refuses a model some of whose weights were not in the files, which libraries fill with random numbers.

    Raises:
        TokenizerError: with some of the keys.
    """
    missing = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in report.get(kind, ()))
    if missing:
        raise TokenizerError(
            f"{source} is no {class_name}: it lacks {len(missing)} of its weights, among them {', '.join(missing[:3])}"
        )


def read_config(cls: type[Tokenizer], file: Path) -> Any:
    """The config of a tokenizer from a file of :func:`write_config`.

    Raises:
        TokenizerError: if the file is damaged or of another tokenizer.
        ConfigError: if a field is unknown or out of range.
    """
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{file} is not a tokenizer config of save_pretrained: {error}") from error
    kind = plain.get("type") if isinstance(plain, dict) else None
    if kind != cls.registered_name:
        raise TokenizerError(f"{file} holds a {kind!r} tokenizer, not {cls.registered_name!r}")
    return cls.Config.from_dict(plain)


def write_config(config: Config, file: Path) -> None:
    """Writes a config as JSON."""
    file.write_text(json.dumps(config.to_dict(), indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' bars and its list of weights that a part of a model does not use."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
