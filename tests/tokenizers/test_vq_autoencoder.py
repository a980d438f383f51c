"""The VQ autoencoder: codes are those of transformers' class, pictures those of diffusers', over the same weights."""

from __future__ import annotations

import pytest
import torch

from omnimoe.config import ConfigError
from omnimoe.tokenizers.vq_autoencoder import VqAutoencoder

SMALL = {"image_size": 16, "channels": 32, "multipliers": (1, 2, 2), "num_blocks": 2, "num_codes": 24}
SMALL |= {"latent_channels": 8, "code_channels": 6}


def built(**changes) -> VqAutoencoder:
    torch.manual_seed(0)
    made = VqAutoencoder.Config(**{**SMALL, **changes}).build().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


def pixels(count: int = 6, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("sizes", [(), (8,), (16, 4)])
@pytest.mark.parametrize("middle", [True, False])
@torch.no_grad()
def test_codes_are_those_of_transformers(sizes, middle):
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

    mine = built(attention_sizes=sizes if middle else (), middle_attention=middle, has_decoder=False)
    theirs = ChameleonVQVAE(
        ChameleonVQVAEConfig(
            resolution=16,
            base_channels=32,
            channel_multiplier=[1, 2, 2],
            num_res_blocks=2,
            attn_resolutions=list(sizes),
            attn_type="vanilla" if middle else "none",
            latent_channels=8,
            embed_dim=6,
            num_embeddings=24,
        )
    ).eval()
    theirs.load_state_dict(mine.state_dict(), strict=True)
    wanted = theirs.encode(pixels()).image_tokens
    assert torch.equal(mine.encode(pixels()), wanted.view(6, 16))
    hidden = theirs.quant_conv(theirs.encoder(pixels()))
    torch.testing.assert_close(mine.quant_conv(mine.encoder(pixels())), hidden, atol=1e-5, rtol=1e-5)
    assert len(wanted.unique()) > 3


@torch.no_grad()
def test_pictures_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="pip install 'omnimoe[diffusers]'")
    from omnimoe.zoo.bagel.autoencoder import diffusers_name

    mine = built()
    theirs = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        latent_channels=8,
        num_vq_embeddings=24,
        vq_embed_dim=6,
    ).eval()
    own = theirs.state_dict()
    held = {diffusers_name(f".{name}", 3).removeprefix("."): tensor for name, tensor in mine.state_dict().items()}
    theirs.load_state_dict({name: tensor.view_as(own[name]) for name, tensor in held.items()}, strict=True)
    codes = torch.randint(24, (3, 16), generator=torch.Generator().manual_seed(2))
    entries = theirs.quantize.get_codebook_entry(codes.flatten(), (3, 4, 4, 6))
    wanted = theirs.decode(entries, force_not_quantize=True).sample
    found = mine.decode(codes)
    assert found.shape == (3, 3, 16, 16)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mine.encoder(pixels()), theirs.encoder(pixels()), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_other_sizes_than_that_of_the_config():
    mine = built()
    codes = mine.encode(pixels(2, 32))
    assert codes.shape == (2, 64)
    assert mine.decode(codes).shape == (2, 3, 32, 32)


def test_without_a_decoder_there_is_no_way_back():
    mine = built(has_decoder=False)
    assert not any(name.startswith("decoder") for name in mine.state_dict())
    with pytest.raises(ValueError, match="published without its decoder"):
        mine.decode(torch.zeros(1, 16, dtype=torch.int64))


def test_what_an_entry_stands_for_is_its_own_code():
    mine = built()
    rows = mine.quantize.embedding.weight[[5, 0, 23]]
    assert mine.quantize(rows.view(1, 3, 6)).tolist() == [[5, 0, 23]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 48}, "multiple of 32, got 48"),
        ({"image_size": 18}, "multiple of 4, which 3 levels make a cell, got 18"),
        ({"num_codes": 0}, "num_codes must be at least 1, got 0"),
        ({"num_blocks": 2**19}, "num_blocks must be at most 32, got 524288"),
        ({"multipliers": (1,) * 40, "image_size": 2**39}, "number of multipliers must be at most 32, got 40"),
        ({"channels": 2**34}, "channels times the largest multiplier must be at most 32768"),
        ({"multipliers": ()}, r"one or more numbers from 1, got \(\)"),
    ],
)
def test_what_makes_no_network_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        VqAutoencoder.Config(**{**SMALL, **changes})
