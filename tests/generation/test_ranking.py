"""Likelihoods equal a plain sum over a full forward, and best-of keeps the likeliest."""

from __future__ import annotations

import pytest
import torch

from omnimoe.generate import GenerationError, generate, log_likelihood
from tests.declarations import DECLARATIONS, DENSE, build
from tests.narrow import narrow_model, narrow_tokenizers

TOKENIZERS = narrow_tokenizers()
BOS, EOS, BEGIN_IMAGE, END_IMAGE = 1, 2, 3, 4


@pytest.mark.parametrize("name", ["dense", "mot", "moe"])
@torch.no_grad()
def test_a_likelihood_is_a_sum_over_a_full_forward(name):
    model = build(DECLARATIONS[name])
    pairs = []
    for caption in ([9], [10, 11, 12], [13, 14]):
        pairs.append(([("image", torch.tensor([0, 1, 2, 3]))], [("text", torch.tensor(caption))]))
    found = log_likelihood(model, pairs, batch_size=2)
    for score, (_, [(_, caption)]) in zip(found, pairs, strict=True):
        ids = torch.tensor([[BOS, BEGIN_IMAGE, 20, 21, 22, 23, END_IMAGE, *caption.tolist(), EOS]])
        each = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)
        assert score == pytest.approx(float(each[6:].sum()), abs=1e-4)


def test_the_likeliest_candidates_are_kept_in_order():
    model = narrow_model()
    options = {"tokenizers": TOKENIZERS, "seed": 0}
    documents = [{"text": "a red apple"}, {"text": "a dog"}]
    every = generate(model, documents, "image", num_samples=5, **options)
    best = generate(model, documents, "image", num_samples=2, best_of=5, **options)
    assert len(best) == 4
    for number, document in enumerate(documents):
        told = [("text", TOKENIZERS["text"].encode(document["text"]))]
        candidates = every[5 * number : 5 * number + 5]
        scores = log_likelihood(model, [([("image", made.ids)], told) for made in candidates])
        wanted = sorted(range(5), key=lambda place: -scores[place])[:2]
        for made, place in zip(best[2 * number : 2 * number + 2], wanted, strict=True):
            assert torch.equal(made.ids, candidates[place].ids)
            assert made.score == pytest.approx(scores[place], abs=1e-4)
    assert every[0].score is None


def test_what_has_no_likelihood_is_refused():
    picture = [("image", torch.tensor([0, 1, 2, 3]))]
    for told in ([], [("latent", torch.zeros(3, 6))]):
        with pytest.raises(GenerationError, match="discrete modalities"):
            log_likelihood(build(DENSE), [(picture, told)])
