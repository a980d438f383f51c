"""The decoder of Chameleon's picture codes, for checkpoints that were published without it.

Meta's own ``vqgan.ckpt`` has it; transformers' conversion, ``facebook/chameleon-7b`` for one, left it out.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from omnimoe import CheckpointError, OmniMoeForCausalLM
from omnimoe.checkpoint.header import read_header
from omnimoe.convert.converter import CONFIG
from omnimoe.zoo.chameleon.convert import CHAMELEON, with_decoder

FILE = "vqgan.safetensors"
_CODEBOOK = "quantize.embedding.weight"


def add_decoder(model: OmniMoeForCausalLM, file: Path) -> None:
    """Gives a model the decoder of its picture codes.

    Args:
        model: of the family; one that has a decoder gets this one.
        file: safetensors with VQGAN's own names, ``decoder.conv_in.weight``, alone or under ``model.vqmodel.``.

    Raises:
        CheckpointError: if the file is missing, damaged, without a decoder, or of another autoencoder.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist, and the decoder of the pictures was to be there")
    read_header(file)
    held = {name.removeprefix("model.vqmodel."): tensor for name, tensor in load_file(file).items()}
    decoder = {name.removeprefix("decoder."): held[name] for name in held if name.startswith("decoder.")}
    if not decoder:
        raise CheckpointError(f"{file} holds no tensor whose name begins with decoder., so nothing draws with it")
    before = model.model.modalities["image"]
    own = before.autoencoder.quantize.embedding.weight
    codebook = held.get(_CODEBOOK)
    if codebook is not None and (
        codebook.shape != own.shape or not torch.allclose(codebook.to(own), own, rtol=1e-2, atol=1e-3)
    ):
        raise CheckpointError(f"{file} is of another autoencoder: its codebook is not that of the model")
    image = model.config.modalities[1]
    image = image.replace(autoencoder=image.autoencoder.replace(has_decoder=True))
    with torch.device(own.device):
        made = image.build(hidden_size=model.config.hidden_size).to(own.dtype)
    mine = made.autoencoder.decoder.state_dict()
    wrong = sorted(
        name
        for name in {*mine, *decoder}
        if getattr(mine.get(name), "shape", 0) != getattr(decoder.get(name), "shape", 1)
    )
    if wrong:
        shapes = [tuple(part[wrong[0]].shape) if wrong[0] in part else "missing" for part in (mine, decoder)]
        raise CheckpointError(
            f"{file} does not fit: decoder.{wrong[0]} is {shapes[1]} in the file and {shapes[0]} in the model"
        )
    made.load_state_dict(
        {**before.state_dict(), **{f"autoencoder.decoder.{name}": tensor for name, tensor in decoder.items()}}
    )
    model.model.modalities["image"] = made.train(model.training)
    config = model.config
    config.modalities = (*config.modalities[:1], image, *config.modalities[2:])
    if config.published:
        files = config.published["files"]
        files = {**files, CONFIG: with_decoder(files[CONFIG])}
        config.published = {**config.published, "family": CHAMELEON.name, "files": files}


__all__ = ["FILE", "add_decoder"]
