"""Real weights: SmolLM2-135M through the published layout, beside transformers, with a perplexity that stays."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from omnimoe import convert_checkpoint, from_pretrained, model_info
from tests.zoo.seeds.smollm2 import tokenizer, write_smollm2

GENESIS = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was "
    "upon the face of the deep. And the Spirit of God moved upon the face of the waters."
)
PERPLEXITY = 7.5873
"""Of these 43 predicted tokens, without a token before them."""


@pytest.mark.slow
def test_real_weights(tmp_path):
    folder = write_smollm2(tmp_path)
    words = tokenizer()
    ours, theirs = from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in ours.parameters()) == model_info("smollm2_135m").total_params
    ids = torch.tensor([words.encode(GENESIS).ids])
    assert ids.shape == (1, 44)
    with torch.no_grad():
        mine, other = ours(ids, labels=ids), theirs(ids, labels=ids)
    assert float((mine.logits - other.logits).norm() / other.logits.norm()) < 1e-5
    assert float(mine.loss.exp()) == pytest.approx(float(other.loss.exp()), rel=1e-5)
    assert float(mine.loss.exp()) == pytest.approx(PERPLEXITY, rel=1e-4)

    prompt = torch.tensor([words.encode("The capital of France is").ids])
    options = {"max_new_tokens": 12, "do_sample": False}
    answer = ours.generate(prompt, **options)
    assert torch.equal(answer, theirs.generate(prompt, **options))
    assert words.decode(answer[0].tolist()).startswith("The capital of France is Paris.")

    convert_checkpoint(folder, tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="published")
    held, found = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert held.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in held.items())
