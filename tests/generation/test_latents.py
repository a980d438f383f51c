"""Continuous spans: drawn after a prompt, given in it, and in the midst of a document."""

from __future__ import annotations

import pytest
import torch

from omnimoe.denoise import denoise
from omnimoe.generate import generate, interleave
from omnimoe.generation.prompts import Prompt
from omnimoe.generation.sampling import row_generators
from omnimoe.layers import Rope
from tests.narrow import LATENT, PICTURE, TRANSFUSION, eager_model, narrow_model, narrow_tokenizers

TOKENIZERS = narrow_tokenizers()
BOS = 1
CLOSE = {"atol": 1e-4, "rtol": 1e-3}


def test_a_span_is_what_denoise_draws():
    model = narrow_model(TRANSFUSION)
    (made,) = generate(model, {"text": "a red apple"}, "latent", tokenizers=TOKENIZERS, seed=4, steps=3, guidance=2.0)
    prompt = torch.tensor([BOS, *TOKENIZERS["text"].encode("a red apple").tolist(), LATENT.begin_id])
    ids = torch.cat((prompt, torch.tensor([LATENT.placeholder_id] * 16 + [LATENT.end_id])))[None]
    (generator,) = row_generators([Prompt(ids=prompt)], [4], 1)
    noise = torch.randn(16, 3, generator=generator)
    wanted = denoise(model, "latent", ids, noise=noise, steps=3, guidance=2.0)
    torch.testing.assert_close(made.rows, wanted, **CLOSE)
    assert made.ids is None
    assert made.raw.shape == (32, 32, 3)


@pytest.mark.parametrize("axes", [1, 3])
def test_a_batch_gives_what_each_document_gives_alone(axes):
    config = TRANSFUSION
    if axes == 3:
        config = config.replace(attention=config.attention.replace(rope=Rope.Config(sections=(4, 2, 2))))
    model = narrow_model(config)
    documents = [{"text": "a"}, [("latent", PICTURE), ("text", "a red apple on a table")], {}]
    options = {"tokenizers": TOKENIZERS, "seed": 0, "steps": 2, "guidance": 3.0}
    together = generate(model, documents, "latent", num_samples=2, **options)
    assert len(together) == 6
    for number, document in enumerate(documents):
        alone = generate(model, document, "latent", num_samples=2, **options)
        for made, own in zip(together[2 * number : 2 * number + 2], alone, strict=True):
            torch.testing.assert_close(made.rows, own.rows, **CLOSE)
    assert not torch.allclose(together[0].rows, together[1].rows, atol=1e-2)


def test_guidance_and_steps_change_what_is_drawn():
    model = narrow_model(TRANSFUSION)
    options = {"tokenizers": TOKENIZERS, "seed": 0}
    rows = [
        generate(model, {"text": "a red apple"}, "latent", steps=steps, guidance=scale, **options)[0].rows
        for steps, scale in ((2, 1.0), (2, 4.0), (8, 1.0))
    ]
    assert not torch.allclose(rows[0], rows[1], atol=1e-2)
    assert not torch.allclose(rows[0], rows[2], atol=1e-2)


def test_a_latent_picture_is_described():
    model = narrow_model(TRANSFUSION)
    options = {"tokenizers": TOKENIZERS, "seed": 0, "max_new_tokens": 30}
    other = 255 - PICTURE
    one, two = generate(model, [{"latent": PICTURE}, {"latent": other}], "text", **options)
    assert not torch.equal(one.ids, two.ids)
    assert torch.equal(one.ids, generate(model, {"latent": PICTURE}, "text", **options)[0].ids)


def test_a_document_goes_on_behind_a_continuous_span():
    model = eager_model(TRANSFUSION)
    options = {"tokenizers": TOKENIZERS, "steps": 2, "max_new_tokens": 90}
    found = [interleave(model, {"text": "a"}, seed=seed, **options)[0] for seed in range(4)]
    names = [[span.modality for span in spans] for spans in found]
    assert any("latent" in row[:-1] for row in names), names
    for spans in found:
        assert all(len(span) == 16 for span in spans if span.modality == "latent")
        assert sum(len(span) for span in spans) <= 90
    again = interleave(model, {"text": "a"}, seed=0, **options)[0]
    assert [span.modality for span in again] == names[0]
