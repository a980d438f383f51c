"""BAGEL beside NeMo AutoModel's port of it, over one published file."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from omnimoe.convert import to_published
from tests.zoo.bagel.documents import VIT, Latent, Text, batch, documents, tokens
from tests.zoo.bagel.peer import hidden_states, make_peer, packed
from tests.zoo.bagel.test_parity import model as model  # a fixture
from tests.zoo.weights import close


def test_a_pack_of_interleaved_documents(model, tmp_path, monkeypatch):
    peer = make_peer(monkeypatch)
    to_published(model, tmp_path / "bagel")
    held = load_file(tmp_path / "bagel" / "ema.safetensors")
    peer.load_state_dict({f"model.{name}": tensor for name, tensor in held.items()}, strict=True)
    chosen = [document for document in documents() if not (len(document) == 1 and isinstance(document[0], Text))]
    chosen = [
        [Latent(part.rows, 0.9) if isinstance(part, Latent) and part.time == 1 else part for part in document]
        for document in chosen  # pure noise cannot be told from zeros by a peer that mixes it in itself
    ]
    given = packed(chosen, VIT["image_size"] // VIT["patch_size"])
    with torch.no_grad():
        hidden, losses = hidden_states(peer, given)
        logits = peer.model.language_model.lm_head(hidden)
        out = model(**batch(model, chosen))
    start = 0
    for row, document in enumerate(chosen):
        count = len(tokens(document))
        close(out.logits[row, :count], logits[start : start + count].double())
        start += count
    velocity = peer.model.llm2vae(hidden[given["packed_vae_token_indexes"]])
    close(out.predictions["image"], velocity.detach().double())
    assert losses["mse"].shape[0] == len(given["mse_loss_indexes"])
