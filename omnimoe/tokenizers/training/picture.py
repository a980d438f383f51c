"""Trains the picture tokenizer: ``python -m omnimoe.tokenizers.training.picture --corpus DIR --out FILE``.

Only pictures of the train split are seen. The loss is L1 on pixels, on two halved copies and on pixel differences: the
halved copies fix colour areas early, the differences keep outlines, and no borrowed perceptual network is needed.
"""

from __future__ import annotations

import logging
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe.tokenizers.picture import PictureAutoencoder, PictureTokenizer
from omnimoe.tokenizers.training.common import (
    AveragedWeights,
    Clock,
    cosine_rate,
    epochs,
    indices_by_split,
    parser,
    prepare,
)

logger = logging.getLogger(__name__)


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
    """Mean PSNR in dB over ``pictures (N, S, S, 3)`` uint8, decoded to uint8, and how many codes they use."""
    decibels, used = [], set()
    for part in pictures.split(128):
        made, ids = network(to_batch(part))
        made = ((made.clamp(-1, 1) + 1) * 127.5).round()
        real = part.permute(0, 3, 1, 2).float()
        error = (made - real).square().mean((1, 2, 3)).clamp_min(1e-2)
        decibels.append(10 * torch.log10(255**2 / error))
        used.update(ids.unique().tolist())
    return {"psnr": torch.cat(decibels).mean().item(), "codes": len(used)}


def train(options) -> dict[str, dict[str, float]]:
    """Trains, writes ``options.out`` and returns the figures of each split."""
    prepare(options.seed)
    pictures = torch.from_numpy(np.load(options.corpus / "images.npy")).to(options.device)
    splits = indices_by_split(options.corpus, "image")
    config = PictureTokenizer.Config()
    tokenizer = PictureTokenizer(config)
    network = tokenizer.network.train().requires_grad_(True).to(options.device, memory_format=torch.channels_last)
    average = AveragedWeights(network, decay=0.998)
    optimizer = torch.optim.AdamW(network.parameters(), options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(options.seed)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    logger.info("%.2f M parameters, pictures: %s", parameters / 1e6, {name: len(ix) for name, ix in splits.items()})

    held_out = pictures[splits["val"][:256] or splits["train"][:256]]
    clock, recent = Clock(options.steps, options.minutes), []
    for step, batch in enumerate(epochs(splits["train"], options.batch_size, generator)):
        progress = clock.progress(step)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * cosine_rate(progress)
        real = augment(to_batch(pictures[batch]), generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast(real.device.type, torch.bfloat16):
            made, _ = network(real)
        loss = reconstruction_loss(made, real)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update(network)
        recent.append(loss.item())
        if step % 100 == 99:
            shown = evaluate(average.network, held_out) if step % 500 == 499 else {}
            extra = "".join(f"  val {name} {value:.2f}" for name, value in shown.items())
            logger.info("step %d  %.0f s  loss %.4f%s", step + 1, clock.seconds, np.mean(recent), extra)
            recent.clear()

    tokenizer = PictureTokenizer(config)
    tokenizer.network.load_state_dict(average.network.state_dict())
    tokenizer.save_pretrained(options.out)
    # Figures are those of the file as stored, in float16, not of the weights in memory.
    network = PictureTokenizer.from_pretrained(options.out).network.to(options.device)
    figures = {split: evaluate(network, pictures[indices]) for split, indices in splits.items() if indices}
    logger.info("%d steps; %s", step, figures)
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line and trains."""
    options = parser(__doc__.splitlines()[0], steps=8000, batch_size=32, learning_rate=1.5e-3).parse_args(arguments)
    train(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
