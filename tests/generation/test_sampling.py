"""The sampler draws from the right distribution, and from the same one as transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from omnimoe.generate import GenerationError
from omnimoe.generation.prompts import Prompt
from omnimoe.generation.sampling import Sampler, Sampling, row_generators, seeds_of, set_sampling
from omnimoe.hub import from_pretrained
from tests.declarations import DENSE, build

BOS, BEGIN_IMAGE = 1, 3


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_p": 0.7}, {"min_p": 0.4}, {"top_k": 2}], ids=str)
def test_what_is_drawn_follows_the_logits(options):
    count = 4_000
    scores = torch.tensor([[0.0, 1.0, 2.0, -1.0] + [-torch.inf] * 36])
    probs = (scores / options.get("temperature", 1.0)).softmax(1)[0]
    ranked = probs.sort(descending=True)
    kept = torch.ones(40, dtype=torch.bool)
    kept[ranked.indices[options.get("top_k", 40) :]] = False
    kept[ranked.indices[(ranked.values.cumsum(0) - ranked.values) >= options.get("top_p", 1.0)]] = False
    kept &= probs >= options.get("min_p", 0.0) * probs.max()
    wanted = probs * kept / (probs * kept).sum()
    sampler = Sampler(DENSE, Sampling(**options), [Generator().manual_seed(seed) for seed in range(count)])
    drawn = sampler(torch.full((count, 1), BOS), scores.expand(count, -1)).argmax(1)
    found = torch.bincount(drawn, minlength=40) / count
    # four standard deviations of a share
    torch.testing.assert_close(found, wanted, atol=4 * 0.5 / count**0.5, rtol=0)
    assert not found[~kept].any()


def test_each_row_has_the_choices_of_the_span_it_stands_in():
    sampling = Sampling(temperature={"image": 0, "text": 2.0})
    sampler = Sampler(DENSE, sampling, [Generator().manual_seed(seed) for seed in range(2)])
    scores = sampler(torch.tensor([[BOS, 9], [BOS, BEGIN_IMAGE]]), torch.arange(40.0).expand(2, -1))
    assert scores.isfinite().sum(1).tolist() == [40, 1]
    assert int(scores[1].argmax()) == 39


def test_a_row_depends_on_its_prompt_seed_and_number_alone():
    first, second = Prompt(ids=torch.tensor([1, 9])), Prompt(ids=torch.tensor([1, 8]))

    def noise(prompts, seeds, count):
        return [float(torch.rand((), generator=held)) for held in row_generators(prompts, seeds, count)]

    a, b = noise([first], [0], 2)
    assert noise([second, first], [0, 0], 3)[3:5] == [a, b]
    others = [*noise([first], [1], 2), *noise([second], [0], 2)]
    assert len({a, b, *others}) == 6


def test_seeds():
    assert seeds_of(3, 2) == [3, 3]
    assert seeds_of([3, 4], 2) == [3, 4]
    assert len(set(seeds_of(None, 3))) == 3
    for wrong in (-1, [1], [1, -2], 1.5, "1"):
        with pytest.raises(GenerationError, match="seed must be 0 or more"):
            seeds_of(wrong, 2)


def test_a_model_brings_its_own_choices(tmp_path):
    model = build(DENSE)
    assert Sampling.usual(model, temperature=None) == Sampling()
    set_sampling(model, {"image": {"temperature": 0.9, "guidance": 3.0}, "text": {"temperature": 0.5}})
    model.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    names = ("temperature", "top_k", "guidance")
    assert Sampling.usual(model, **dict.fromkeys(names)) == Sampling(
        temperature={"image": 0.9, "text": 0.5}, guidance={"image": 3.0}
    )
    assert Sampling.usual(model, temperature={"image": 0.7}).temperature == {"image": 0.7, "text": 0.5}
    assert Sampling.usual(model, temperature=1.0, guidance=None) == Sampling(temperature=1.0, guidance={"image": 3.0})
    for wrong in ({"image": 0.9}, {"image": {"temperatur": 1}}, {"video": {"temperature": 1}}, {"image": {"top_k": 0}}):
        with pytest.raises(GenerationError):
            set_sampling(model, wrong)  # type: ignore[arg-type]
    assert model.generation_config.sampling["text"] == {"temperature": 0.5}
