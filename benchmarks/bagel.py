"""BAGEL beside NeMo AutoModel's port of it, for ``families.py``: prefill, a decoded token, a step of drawing, cached.

The port's kernels for attention need a GPU; in their place it is given PyTorch's, which is also what we use.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omnimoe import from_pretrained
from omnimoe.convert import to_published
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.zoo.bagel import BAGEL
from omnimoe.zoo.bagel.convert import BEGIN, DRAWN, END
from tests.zoo.bagel.documents import LLM, VIT
from tests.zoo.bagel.peer import make_peer

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
PROMPT, SIDE = 256, 16


@torch.no_grad()
def cases(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Each case with our model, and with the port, of the same random weights."""
    llm = {**LLM, **SIZES}
    peer = make_peer(pytest.MonkeyPatch(), llm, VIT, dtype).eval()
    torch.manual_seed(0)
    model = OmniMoeForCausalLM(BAGEL.config_of({"llm_config.json": llm, "vit_config.json": VIT})).eval()
    for name, parameter in model.named_parameters():
        if not name.endswith("place.weight"):
            parameter.add_(torch.randn_like(parameter) * 0.02)
    with tempfile.TemporaryDirectory() as folder:
        to_published(model, Path(folder) / "bagel")
        held = load_file(Path(folder) / "bagel" / "ema.safetensors")
        model = from_pretrained(Path(folder) / "bagel", dtype=dtype)
    peer.load_state_dict({f"model.{name}": tensor for name, tensor in held.items()}, strict=True)
    ours, theirs = Ours(model), Port(peer)
    ids = torch.randint(0, 1000, (1, PROMPT))
    latents = torch.randn(SIDE, SIDE, 64).to(dtype)
    return {
        "prefill": (lambda: ours.prefill(ids), lambda: theirs.prefill(ids)),
        "decode": (lambda: ours.decode(7), lambda: theirs.decode(7)),
        "step": (lambda: ours.step(latents, 0.6), lambda: theirs.step(latents, 0.6)),
    }


class Ours:
    """The three cases with our model."""

    def __init__(self, model: OmniMoeForCausalLM) -> None:
        self.model = model
        self.cache = None

    def prefill(self, ids: Tensor) -> Tensor:
        """``(V,)`` logits of what follows a prompt, whose cache is kept."""
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return out.logits[0, 0]

    def decode(self, token: int) -> Tensor:
        """``(V,)`` logits of one token more, which the cache forgets again."""
        out = self.model(
            input_ids=torch.tensor([[token]]),
            position_ids=torch.tensor([[PROMPT]]),
            past_key_values=self.cache,
        )
        self.cache.crop(-1)
        return out.logits[0, 0]

    def step(self, latents: Tensor, at: float) -> Tensor:
        """``(n, 64)`` velocities of a picture being drawn."""
        ids = torch.tensor([[BEGIN, *[DRAWN] * SIDE**2, END]])
        out = self.model(
            input_ids=ids,
            position_ids=torch.full_like(ids, PROMPT),
            past_key_values=self.cache,
            features={"image": [latents]},
            timesteps={"image": torch.tensor([at])},
            logits_to_keep=torch.arange(0),  # as denoise asks for
        )
        self.cache.crop(-ids.shape[1])
        return out.predictions["image"]


class Port:
    """The same with the port, as its inference calls its parts."""

    def __init__(self, peer: torch.nn.Module) -> None:
        from nemo_automodel.components.models.bagel.modeling_qwen2_packed import NaiveCache

        self.peer, self.kind, self.cache = peer.model, NaiveCache, None

    def _run(self, rows: Tensor, places: Tensor, *, past: int, **options) -> Tensor:
        out = self.peer.language_model.forward_inference(
            packed_query_sequence=rows,
            query_lens=torch.tensor([len(rows)]),
            packed_query_position_ids=places,
            packed_query_indexes=torch.arange(past, past + len(rows)),
            past_key_values=self.cache,
            key_values_lens=torch.tensor([past]),
            packed_key_value_indexes=torch.arange(past),
            **options,
        )
        return out.packed_query_sequence

    def prefill(self, ids: Tensor) -> Tensor:
        """See :class:`Ours`."""
        self.cache = self.kind(SIZES["num_hidden_layers"])
        rows = self.peer.language_model.model.embed_tokens(ids[0])
        kept = self._run(rows, torch.arange(PROMPT), past=0, is_causal=True, mode="und")
        return self.peer.language_model.lm_head(kept[-1])

    def decode(self, token: int) -> Tensor:
        """See :class:`Ours`."""
        rows = self.peer.language_model.model.embed_tokens(torch.tensor([token]))
        kept = self._run(
            rows, torch.tensor([PROMPT]), past=PROMPT, is_causal=True, mode="und", update_past_key_values=False
        )
        return self.peer.language_model.lm_head(kept)[0]

    def step(self, latents: Tensor, at: float) -> Tensor:
        """See :class:`Ours`."""
        peer, count = self.peer, SIDE**2
        text, drawn = torch.tensor([0, count + 1]), torch.arange(1, count + 1)
        rows = latents.new_zeros(count + 2, SIZES["hidden_size"])
        rows[text] = peer.language_model.model.embed_tokens(torch.tensor([BEGIN, END]))
        places = (torch.arange(SIDE).unsqueeze(1) * 64 + torch.arange(SIDE)).flatten()
        with torch.autocast("cpu", latents.dtype, enabled=latents.dtype != torch.float32):  # its sines are in float32
            times = peer.time_embedder(torch.full((count,), at))
        rows[drawn] = peer.vae2llm(latents.view(count, 64)) + times + peer.latent_pos_embed(places)
        found = self._run(
            rows,
            torch.full((count + 2,), PROMPT),
            past=PROMPT,
            is_causal=False,
            mode="gen",
            update_past_key_values=False,
            packed_vae_token_indexes=drawn,
            packed_text_indexes=text,
        )
        return peer.llm2vae(found[drawn])
