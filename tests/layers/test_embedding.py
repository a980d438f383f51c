"""A table that is scaled on the way in and shared with the head as it is."""

from __future__ import annotations

import torch

from omnimoe import OmniMoeConfig, OmniMoeForCausalLM, Tokens
from omnimoe.layers.embedding import ScaledEmbedding


def test_rows_are_multiplied_by_the_number_in_the_dtype_of_the_table():
    table = ScaledEmbedding(5, 4, 3.14159).bfloat16()
    ids = torch.tensor([[0, 4], [2, 2]])
    assert torch.equal(table(ids), table.weight[ids] * torch.tensor(3.14159).bfloat16())


def test_a_model_scales_what_enters_and_not_its_head():
    config = OmniMoeConfig(
        hidden_size=16, num_layers=1, modalities=(Tokens.Config(name="text", vocab_size=8),), tie_word_embeddings=True
    )
    torch.manual_seed(0)
    plain = OmniMoeForCausalLM(config).eval()
    torch.manual_seed(0)
    scaled = OmniMoeForCausalLM(config.replace(embedding_scale=4.0)).eval()
    ids = torch.tensor([[1, 2, 3]])
    assert scaled.lm_head.weight is scaled.get_input_embeddings().weight
    with torch.no_grad():
        wanted = plain(inputs_embeds=4.0 * plain.get_input_embeddings()(ids)).logits
        assert torch.equal(scaled(ids).logits, wanted)
        assert torch.equal(scaled(inputs_embeds=scaled.get_input_embeddings()(ids)).logits, wanted)
    resized = scaled.resize_token_embeddings(12)
    assert isinstance(resized, ScaledEmbedding)
