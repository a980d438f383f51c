"""Trains the picture tokenizer: ``python -m omnimoe.tokenizers.training.picture --corpus DIR --out FILE``.

Only pictures of the train split are seen. The loss is L1 on pixels, on two halved copies and on pixel differences: the
halved copies fix colour areas early, the differences keep outlines, and no borrowed perceptual network is needed.
``--adversarial`` adds an opponent; ``--decoder-only`` leaves the encoder, and so every id, as it is.
"""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from omnimoe.tokenizers.autoencoder import PictureAutoencoder
from omnimoe.tokenizers.base import TOKENIZERS
from omnimoe.tokenizers.training.adversarial import Opponent
from omnimoe.tokenizers.training.common import epochs, fit, indices_by_split, parser, prepare

logger = logging.getLogger(__name__)

_DIVERGENCE_WEIGHT = 3e-3
_DECODER = ("from_codes.", "decoder_")


def to_batch(pictures: Tensor) -> Tensor:
    """``(B, H, W, 3)`` uint8 to ``(B, 3, H, W)`` float32 in ``[-1, 1]``."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Flips, small shifts and scales, and permuted or faded colours; ``(B, 3, S, S)`` to the same.

    A third of the pictures stays as it is, so that the average picture seen is still one of the corpus.
    """
    batch, _, side, _ = pictures.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator).to(pictures.device)

    flip = torch.where(uniform(0, 1, batch) < 0.5, -1.0, 1.0)
    scale = uniform(0.85, 1.2, batch)
    theta = torch.zeros(batch, 2, 3, device=pictures.device)
    theta[:, 0, 0], theta[:, 1, 1] = scale * flip, scale
    theta[:, :, 2] = uniform(-0.1, 0.1, batch, 2)
    grid = F.affine_grid(theta, [batch, 3, side, side], align_corners=False)
    moved = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    recoloured = moved[:, torch.randperm(3, generator=generator)]
    moved = torch.where((uniform(0, 1, batch) < 0.2).view(-1, 1, 1, 1), recoloured, moved)
    gain = uniform(0.8, 1.0, batch, 3, 1, 1)
    moved = torch.where((uniform(0, 1, batch) < 0.3).view(-1, 1, 1, 1), 1 - (1 - moved) * gain, moved)
    return torch.where((uniform(0, 1, batch) < 1 / 3).view(-1, 1, 1, 1), pictures, moved.clamp(-1, 1))


def reconstruction_loss(made: Tensor, real: Tensor) -> Tensor:
    """L1 and squared error of pixels, L1 of two halved copies and of the differences along both axes."""
    error = (made - real).float()
    loss = error.abs().mean() + error.square().mean()
    loss = loss + 0.5 * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())
    for _ in range(2):
        error = F.avg_pool2d(error, 2)
        loss = loss + 0.5 * error.abs().mean()
    return loss


@torch.inference_mode()
def evaluate(network: PictureAutoencoder, pictures: Tensor) -> dict[str, float]:
    """Mean PSNR in dB over ``pictures (N, S, S, 3)`` uint8, decoded to uint8, and for ids how many codes they use."""
    decibels: list[Tensor] = []
    used: set[int] = set()
    for part in pictures.split(128):
        made, extra = network(to_batch(part))
        made = ((made.clamp(-1, 1) + 1) * 127.5).round()
        real = part.permute(0, 3, 1, 2).float()
        error = (made - real).square().mean((1, 2, 3)).clamp_min(1e-2)
        decibels.append(10 * torch.log10(255**2 / error))
        used.update([] if extra.is_floating_point() else extra.unique().tolist())
    return {"psnr": torch.cat(decibels).mean().item(), **({"codes": len(used)} if used else {})}


def start_from(network: PictureAutoencoder, file: Path) -> None:
    """Takes over what fits from the weights of another picture tokenizer; positions are resampled to the own grid.

    The layers at the bottleneck stay fresh if it has another width. Raises OSError if there is no such file.
    """
    own, given = network.state_dict(), load_file(file)
    for name, value in given.items():
        if name.endswith("_positions") and value.shape != own[name].shape:
            side = math.isqrt(len(value))
            square = value.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
            value = F.interpolate(square, size=(network.side,) * 2, mode="bilinear", align_corners=False)
            value = value[0].flatten(1).T
        if name in own and own[name].shape == value.shape:
            own[name] = value.float()
    network.load_state_dict(own)


def train(options) -> dict[str, dict[str, float]]:
    """Trains, writes ``options.out`` and returns the figures of each split.

    Raises:
        ValueError: if the pictures of the corpus have another size than the tokenizer's.
    """
    prepare(options.seed)
    pictures = torch.from_numpy(np.load(options.corpus / "images.npy")).to(options.device)
    splits = indices_by_split(options.corpus, "image")
    tokenizer = TOKENIZERS.get(options.tokenizer).Config().build()
    if pictures.shape[1] != tokenizer.image_size:
        raise ValueError(
            f"{options.tokenizer} is for pictures of {tokenizer.image_size} pixels, {options.corpus} has "
            f"{pictures.shape[1]}; build it with omnimoe data build --image-size {tokenizer.image_size}"
        )
    network = tokenizer.network.train().requires_grad_(True).to(options.device, memory_format=torch.channels_last)
    if options.init is not None:
        start_from(network, options.init)
    if options.decoder_only:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith(_DECODER))
    opponent = Opponent(network.decoder_head[-2].weight, options.adversarial) if options.adversarial else None
    logger.info("pictures: %s", {name: len(indices) for name, indices in splits.items()})
    generator = torch.Generator().manual_seed(options.seed)

    def loss_of(batch: Tensor) -> Tensor:
        real = augment(to_batch(pictures[batch]), generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast(real.device.type, torch.bfloat16):
            made, extra = network(real)
        loss = reconstruction_loss(made, real)
        if opponent is not None:
            loss = loss + opponent.loss(made, real, loss)
        return loss + _DIVERGENCE_WEIGHT * extra if extra.is_floating_point() else loss

    held_out = pictures[splits["val"][:256] or splits["train"][:256]]
    average = fit(
        network,
        epochs(splits["train"], options.batch_size, generator),
        loss_of,
        options,
        evaluate=lambda averaged: evaluate(averaged, held_out),
    )

    tokenizer = type(tokenizer)(tokenizer.config)
    tokenizer.network.load_state_dict(average.state_dict())
    if tokenizer.is_continuous:
        tokenizer.standardize(pictures[splits["train"]].cpu().numpy())
    tokenizer.save_pretrained(options.out)
    # Figures are those of the file as stored, in float16, not of the weights in memory.
    network = type(tokenizer).from_pretrained(options.out).network.to(options.device)
    figures = {split: evaluate(network, pictures[indices]) for split, indices in splits.items() if indices}
    logger.info("%s", figures)
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line and trains."""
    options = parser(__doc__.splitlines()[0], steps=8000, batch_size=32, learning_rate=1.5e-3)
    options.add_argument(
        "--tokenizer",
        default="picture",
        choices=("picture", "picture_128", "picture_latents"),
        help="which form (%(default)s)",
    )
    options.add_argument("--init", type=Path, help="weights to start from, of this form or another (none)")
    options.add_argument("--decoder-only", action="store_true", help="leave the encoder of --init as it is")
    options.add_argument(
        "--adversarial",
        type=float,
        default=0.0,
        help="size of an opponent's gradient beside that of the reconstruction; 0 for none (%(default)s)",
    )
    asked = options.parse_args(arguments)
    if asked.decoder_only and asked.init is None:
        options.error("--decoder-only needs the weights of an encoder: --init FILE")
    if not 0 <= asked.adversarial < math.inf:
        options.error(f"--adversarial must be finite and not negative, got {asked.adversarial}")
    train(asked)
    return 0


if __name__ == "__main__":
    sys.exit(main())
