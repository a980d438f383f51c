"""BAGEL's picture autoencoder: diffusers' network under the published names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from omnimoe import CheckpointError

pytest.importorskip("diffusers", reason="pip install 'omnimoe[diffusers]'")

from omnimoe.zoo.bagel.autoencoder import FILE, BagelAutoencoder, diffusers_name

SMALL = {"block_out_channels": (32, 64, 64)}


def published(network: torch.nn.Module, levels: int) -> dict[str, torch.Tensor]:
    """Weights as the file names them: the way back, written from the published list, kernels where those are."""
    found = {}
    for name, tensor in network.state_dict().items():
        coder, _, rest = name.partition(".")
        parts = rest.split(".")
        if parts[0] in ("down_blocks", "up_blocks"):
            level = int(parts[1]) if parts[0] == "down_blocks" else levels - 1 - int(parts[1])
            inner = {"resnets": f"block.{parts[3]}", "downsamplers": "downsample", "upsamplers": "upsample"}[parts[2]]
            tail = ".".join(parts[4:]).replace("conv_shortcut", "nin_shortcut")
            rest = f"{parts[0].split('_')[0]}.{level}.{inner}.{tail}"
        elif parts[0] == "mid_block" and parts[1] == "resnets":
            rest = f"mid.block_{int(parts[2]) + 1}.{'.'.join(parts[3:])}"
        elif parts[0] == "mid_block":
            part = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[parts[3]]
            rest = f"mid.attn_1.{part}.{parts[-1]}"
            tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        elif parts[0] == "conv_norm_out":
            rest = f"norm_out.{parts[1]}"
        found[f"{coder}.{rest}"] = tensor.contiguous()
    return found


@pytest.fixture(scope="module")
def small() -> BagelAutoencoder:
    torch.manual_seed(0)
    return BagelAutoencoder(SMALL)


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    made = tmp_path_factory.mktemp("bagel")
    save_file(published(small.network, 3), made / FILE)
    return made


def test_every_published_name_has_its_place():
    """At full size, of the published file: 244 tensors."""
    with torch.device("meta"):
        full = BagelAutoencoder()
    held = published(full.network, 4)
    assert len(held) == 244
    own = full.network.state_dict()
    assert {diffusers_name(name) for name in held} == set(own)
    assert all(held[name].numel() == own[diffusers_name(name)].numel() for name in held)
    assert held["decoder.up.0.block.2.conv2.weight"].shape == (128, 128, 3, 3)
    assert held["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)


def test_a_file_is_read_to_the_bit(small, folder):
    held = BagelAutoencoder.from_folder(folder)
    assert all(map(torch.equal, held.network.state_dict().values(), small.network.state_dict().values()))


def test_rows_are_patches_by_row_column_and_channel(small):
    picture = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    (rows,) = small.encode([picture])
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latent = (small.network.encode(pixels).latent_dist.mode() - 0.1159) * 0.3611
    assert rows.shape == (latent.shape[2] // 2, latent.shape[3] // 2, 64)
    for r, c, p, q, channel in torch.randint(0, 2, (20, 5)).tolist():
        assert torch.isclose(
            rows[r, c, (p * 2 + q) * 16 + channel], latent[0, channel, 2 * r + p, 2 * c + q], atol=1e-6
        )
    with torch.no_grad():
        back = small.network.decode(latent / 0.3611 + 0.1159).sample[0].permute(1, 2, 0)
    wanted = ((back.clamp(-1, 1) + 1) * 127.5).round()
    assert np.abs(small.decode([rows])[0].astype(int) - wanted.numpy()).max() <= 1


def test_a_generator_draws_from_the_posterior_and_repeats(small):
    picture = np.full((16, 16, 3), 90, np.uint8)
    first, second = (small.encode([picture], generator=torch.Generator().manual_seed(1))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, small.encode([picture])[0])


def test_bad_files_and_pictures_are_refused(small, folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no ae\.safetensors"):
        BagelAutoencoder.from_folder(tmp_path)
    held = published(small.network, 3)
    held.pop("decoder.mid.attn_1.k.bias")
    save_file(held, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"lacks decoder\.mid_block\.attentions\.0\.to_k\.bias"):
        BagelAutoencoder.from_folder(tmp_path)
    save_file({**published(small.network, 3), "encoder.extra": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"holds encoder\.extra, which the network does not have"):
        BagelAutoencoder.from_folder(tmp_path)
    held = {**published(small.network, 3), "decoder.conv_out.bias": torch.zeros(4)}
    save_file(held, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"decoder\.conv_out\.bias of .* is \(4,\)"):
        BagelAutoencoder.from_folder(tmp_path)
    with pytest.raises(ValueError, match=r"multiples of 16, got \(20, 32, 3\)"):
        small.encode([np.zeros((20, 32, 3), np.uint8)])


def test_beside_the_port(small):
    port = pytest.importorskip(
        "nemo_automodel.components.models.bagel.autoencoder", reason="pip install --no-deps nemo-automodel==0.7.0"
    )
    peer = port.AutoEncoder(port.AutoEncoderParams(64, 3, 4, 32, 3, [1, 2, 2], 2, 16, 0.3611, 0.1159)).eval()
    mine = BagelAutoencoder(SMALL)
    mine.load_published(peer.state_dict())
    picture = np.random.default_rng(1).integers(0, 255, (32, 16, 3), dtype=np.uint8)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latent = 0.3611 * (peer.encoder(pixels).chunk(2, 1)[0] - 0.1159)
    (rows,) = mine.encode([picture])
    cells = latent[0].reshape(16, rows.shape[0], 2, rows.shape[1], 2)
    torch.testing.assert_close(rows, torch.einsum("chpwq->hwpqc", cells).flatten(2), atol=1e-5, rtol=1e-4)
