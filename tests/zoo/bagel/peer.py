"""NeMo AutoModel's port of BAGEL, as a peer: ``pip install --no-deps nemo-automodel==0.7.0``.

It computes attention in bfloat16 and by kernels that only a GPU has; here its modules see a ``torch`` whose bfloat16 is
float32, and PyTorch's attention in the place of those kernels. Its forward in training is the one it shares with the
original, packed, over samples with their own masks.
"""

from __future__ import annotations

import contextlib
import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.bagel.documents import LLM, VIT, Document, Seen, Text, tokens
from tests.zoo.bagel.oracle import may_see


class _Torch(types.ModuleType):
    """``torch`` with another value for some names."""

    def __init__(self, **changed) -> None:
        super().__init__("torch")
        self.__dict__.update(changed)

    def __getattr__(self, name: str):
        return getattr(torch, name)


def _attend(q, k, v, *, cu_seqlens_q, cu_seqlens_k, causal, **_):
    """What the kernel computes, sequence by sequence; a causal one has all its queries new, or one."""
    parts = []
    spans = zip(*(itertools.pairwise(ends.tolist()) for ends in (cu_seqlens_q, cu_seqlens_k)), strict=True)
    for (start, stop), (first, last) in spans:
        query = q[start:stop].transpose(0, 1).unsqueeze(0)
        key, value = (part[first:last].transpose(0, 1).unsqueeze(0) for part in (k, v))
        whole = causal and stop - start == last - first
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=whole, enable_gqa=True)
        parts.append(mixed[0].transpose(0, 1))
    return torch.cat(parts)


def make_peer(monkeypatch, llm: dict = LLM, vit: dict = VIT, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The port at a size, in training mode; skips the test where it is not installed. In bfloat16 as it is."""
    pytest.importorskip("nemo_automodel.components.models.bagel", reason="pip install --no-deps nemo-automodel==0.7.0")
    from nemo_automodel.components.models.bagel import model, modeling_qwen2_packed, modeling_siglip_navit
    from nemo_automodel.components.models.bagel.configuration import BagelConfig

    single = _Torch(bfloat16=dtype)
    monkeypatch.setattr(modeling_qwen2_packed, "torch", single)
    monkeypatch.setattr(modeling_siglip_navit, "torch", single)
    monkeypatch.setattr(modeling_qwen2_packed, "sdpa_kernel", lambda **_: contextlib.nullcontext())
    monkeypatch.setattr(modeling_siglip_navit, "_flash_attn_varlen", _attend)
    monkeypatch.setattr(modeling_qwen2_packed, "_flash_attn_varlen", _attend)
    monkeypatch.setattr(model, "torch", _Torch(randn_like=torch.zeros_like))  # noise is in the rows already
    config = BagelConfig(
        vision_config=dict(vit),
        text_config={**llm, "layer_module": "Qwen2MoTDecoderLayer", "qk_norm": True},
        visual_und=True,
        visual_gen=True,
        stage=2,
        vae_config={"z_channels": 16, "downsample": 8},
        vit_max_num_patch_per_side=vit["image_size"] // vit["patch_size"],
    )
    return model.BagelForUnifiedMultimodal(config).to(dtype)


def unpatched(rows: Tensor) -> Tensor:
    """Patches ``(rows, columns, 64)`` to the latent ``(16, 2 rows, 2 columns)`` they were cut from."""
    tall, wide, _ = rows.shape
    return torch.einsum("hwpqc->chpwq", rows.view(tall, wide, 2, 2, 16)).reshape(16, 2 * tall, 2 * wide)


def packed(held: list[Document], side: int) -> dict:
    """Documents as the port takes them: one row of tokens, indices into it, a mask for each sample."""
    found: dict[str, list] = {
        name: [] for name in ("ids", "text", "places", "vit", "vit_at", "vit_place", "vit_len", "latent", "shape")
    }
    found |= {"latent_place": [], "latent_at": [], "times": [], "noised_at": []}
    masks, lengths, at = [], [], 0
    for document in held:
        place, splits, kinds = 0, [], []
        for split, part in enumerate(document):
            ids = tokens([part])
            if isinstance(part, Text):
                found["ids"] += ids
                found["text"] += range(at, at + len(ids))
                found["places"] += range(place, place + len(ids))
                kinds += ["causal"] * len(ids)
                place += len(ids)
            else:
                cells = part.patches if isinstance(part, Seen) else part.rows
                tall, wide, _ = cells.shape
                inner = range(at + 1, at + len(ids) - 1)
                found["ids"] += [ids[0], ids[-1]]
                found["text"] += [at, at + len(ids) - 1]
                found["places"] += [place] * len(ids)
                is_noised = not isinstance(part, Seen) and part.time > 0
                kinds += ["noise" if is_noised else "full"] * len(ids)
                place += not is_noised
                if isinstance(part, Seen):
                    found["vit"].append(cells.reshape(-1, cells.shape[2]))
                    found["vit_at"] += inner
                    found["vit_place"] += [r * side + c for r in range(tall) for c in range(wide)]
                    found["vit_len"].append(tall * wide)
                else:
                    # the port adds noise itself: with zeros for noise, rows are divided by what it multiplies with
                    clean = cells / (1 - part.time)
                    found["latent"].append(
                        torch.einsum("hwpqc->chpwq", clean.view(tall, wide, 2, 2, 16)).reshape(16, 2 * tall, -1)
                    )
                    found["shape"].append((tall, wide))
                    found["latent_place"] += [r * 64 + c for r in range(tall) for c in range(wide)]
                    found["latent_at"] += inner
                    found["times"] += [part.time] * len(inner)
                    found["noised_at"] += inner if is_noised else []
            splits += [split] * len(ids)
            at += len(ids)
        count = len(splits)
        seen = torch.tensor([[may_see(q, k, splits, kinds) for k in range(count)] for q in range(count)])
        masks.append(torch.zeros(count, count).masked_fill(~seen, float("-inf")))
        lengths.append(count)
    times = torch.tensor(found["times"])
    return {
        "sequence_length": at,
        "packed_text_ids": torch.tensor(found["ids"]),
        "packed_text_indexes": torch.tensor(found["text"]),
        "sample_lens": lengths,
        "packed_position_ids": torch.tensor(found["places"]),
        "nested_attention_masks": masks,
        "packed_vit_tokens": torch.cat(found["vit"]),
        "packed_vit_token_indexes": torch.tensor(found["vit_at"]),
        "packed_vit_position_ids": torch.tensor(found["vit_place"]),
        "vit_token_seqlens": torch.tensor(found["vit_len"]),
        "padded_latent": found["latent"],
        "patchified_vae_latent_shapes": found["shape"],
        "packed_latent_position_ids": torch.tensor(found["latent_place"]),
        "packed_vae_token_indexes": torch.tensor(found["latent_at"]),
        "packed_timesteps": torch.logit(times),
        "mse_loss_indexes": torch.tensor(found["noised_at"]),
    }


def hidden_states(peer: nn.Module, given: dict) -> tuple[Tensor, dict]:
    """What leaves the stack ``(T, D)``, and the losses."""
    kept: list[Tensor] = []
    hook = peer.model.language_model.register_forward_hook(lambda module, args, out: kept.append(out))
    out = peer(**given)
    hook.remove()
    return kept[0], out
