"""What the learned tokenizers share: a small network, one safetensors file of weights and config, and guards.

The file is data, never code: the config travels as JSON in the safetensors header. Weights are stored in float16, at
half the size and no visible loss, and computed in float32.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from omnimoe.config import Config
from omnimoe.tokenizers.base import Tokenizer, TokenizerError

WEIGHTS = Path(__file__).parent / "weights"


class CodecTokenizer(Tokenizer):
    """A tokenizer around a trained autoencoder, kept in :attr:`network` (in eval mode, without gradients)."""

    shipped: ClassVar[str]
    """File name of the weights that ship with the package."""

    network: nn.Module

    def __init__(self, config: Config, network: nn.Module) -> None:
        super().__init__(config)
        self.network = network.float().eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the network computes; ids are always returned on the CPU."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Moves the network to ``device`` and returns the tokenizer."""
        self.network.to(device)
        return self

    def save_pretrained(self, path: str | PathLike[str], notes: dict[str, str] | None = None) -> None:
        """Writes one safetensors file: float16 weights, the config in its header.

        Args:
            path: a file name that ends in ``.safetensors``, or a folder, where the file is called
                ``<registered name>_tokenizer.safetensors``.
            notes: more header entries, such as data and figures measured.
        """
        file = self._file_in(Path(path))
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            key: value.detach().cpu().to(torch.float16 if value.is_floating_point() else value.dtype).contiguous()
            for key, value in self.network.state_dict().items()
        }
        save_file(state, file, metadata={"config": json.dumps(self.config.to_dict()), **(notes or {})})

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str] | None = None) -> Self:
        """Reads a file written by :meth:`save_pretrained`.

        Args:
            path: the file, the folder it lies in, or ``None`` for the weights that ship with the package.

        Raises:
            TokenizerError: if there is no such file, or it is damaged, or holds another kind of tokenizer.
        """
        file = WEIGHTS / cls.shipped if path is None else cls._file_in(Path(path))
        if not file.is_file():
            raise TokenizerError(
                f"no {cls.registered_name} tokenizer at {file}; pass a file or folder of save_pretrained"
            )
        try:
            with safe_open(file, framework="pt") as reader:
                header = reader.metadata() or {}
                state = {key: reader.get_tensor(key).float() for key in reader.keys()}  # noqa: SIM118 - not a dict
            plain = json.loads(header["config"])
        except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
            raise TokenizerError(f"{file} is not a tokenizer file of save_pretrained: {error!r}") from error
        kind = plain.pop("type", None)
        if kind != cls.registered_name:
            raise TokenizerError(f"{file} holds a {kind!r} tokenizer, not {cls.registered_name!r}")
        place = torch.get_default_device()
        # the first weights of a network are drawn, and these are thrown away
        with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
            tokenizer = cls.Config.from_dict(plain).build()
        try:
            tokenizer.network.load_state_dict(state)
        except RuntimeError as error:
            raise TokenizerError(f"the weights in {file} do not fit the config in its header: {error}") from error
        return tokenizer

    @classmethod
    def _file_in(cls, path: Path) -> Path:
        return path if path.suffix == ".safetensors" else path / f"{cls.registered_name}_tokenizer.safetensors"
