"""Pictures and text from BAGEL at a tiny size: guided steps and greedy tokens, against a walk over its formulas."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from safetensors.torch import load_file

from omnimoe.convert import to_published
from omnimoe.denoise import denoise
from omnimoe.guidance import Guidance
from omnimoe.inputs import InputError
from omnimoe.zoo.bagel.convert import BOS
from tests.zoo.bagel import oracle
from tests.zoo.bagel.documents import Latent, Seen, Text, batch, documents
from tests.zoo.bagel.test_parity import model as model  # a fixture
from tests.zoo.weights import close


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "bagel"
    to_published(model, folder)
    return {name: held.double() for name, held in load_file(folder / "ema.safetensors").items()}


SHAPE = (2, 3)


def drawing(pictures: bool):
    """A document whose last part is drawn: words, and before them a picture seen and a clean one if ``pictures``."""
    _, seen, _, clean, _ = documents()[0]
    before = [seen, clean] if pictures else []
    noise = torch.randn(*SHAPE, 64, generator=torch.Generator().manual_seed(5))
    return [*before, Text([5, 6, 7]), Latent(noise, 1.0)]


def asked(model, held):
    """What ``denoise`` takes for documents whose last picture is drawn."""
    given = batch(model, held, side="left")
    latents = [[part for part in document if isinstance(part, Latent)] for document in held]
    noise = torch.cat([parts[-1].rows.flatten(0, 1) for parts in latents])
    clean = [part.rows for parts in latents for part in parts[:-1]]
    given.pop("timesteps")
    given["features"].pop("image")
    if clean:
        given["features"]["image"] = clean
    mine = model.model.modality_ids_of(given["input_ids"]) == 2
    starts = mine & ~torch.nn.functional.pad(mine[:, :-1], (1, 0))
    order = starts.cumsum(1)
    drawn = mine & (order == order.max(dim=1, keepdim=True).values)
    return {**given, "drawn": drawn, "noise": noise, "sizes": [parts[-1].rows.shape[:2] for parts in latents]}


def walked(weights, document, steps: int, shift: float, scales: tuple[float, float], interval, renorm: str):
    """The published loop over one document, in float64."""
    x = document[-1].rows.double()
    even = [1 - step / steps for step in range(steps + 1)]
    times = [shift * t / (1 + (shift - 1) * t) for t in even]

    def velocity(parts, t):
        return oracle.run(weights, [*parts, Latent(x, t)])[1][-1]

    for t, after in itertools.pairwise(times):
        v = whole = velocity(document[:-1], t)
        if interval[0] < t <= interval[1]:
            words = velocity([part for part in document[:-1] if not isinstance(part, Text)], t)
            sights = velocity([part for part in document[:-1] if not isinstance(part, Seen | Latent)], t)
            v = words + scales[0] * (v - words)
            if renorm == "first_channel":
                v = v * (whole.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True)).clamp(max=1)
            v = sights + scales[1] * (v - sights)
            if renorm == "global":
                v = v * (whole.norm() / v.norm()).clamp(max=1)
            elif renorm == "channel":
                v = v * (whole.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True)).clamp(max=1)
        x = x - (v * (t - after)).view_as(x)
    return x.flatten(0, 1)


GUIDE = Guidance(scales=((("text",), 4.0), (("vision", "image"), 1.5)), interval=(0.4, 1.0))


@pytest.mark.parametrize("pictures", [False, True])
@pytest.mark.parametrize("renorm", ["none", "global", "channel", "first_channel"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_guided_steps(model, weights, pictures, renorm, use_cache):
    document = drawing(pictures)
    guide = dataclasses.replace(GUIDE, renorm=renorm)
    given = asked(model, [document])
    found = denoise(
        model, "image", given.pop("input_ids"), steps=3, shift=3.0, guidance=guide, use_cache=use_cache, **given
    )
    wanted = walked(weights, document, 3, 3.0, (4.0, 1.5), (0.4, 1.0), renorm)
    close(found, wanted)


def test_a_batch_is_drawn_as_each_alone(model):
    """Documents of different lengths, with and without pictures; what the original does one by one."""
    held = [drawing(False), drawing(True)]
    guide = dataclasses.replace(GUIDE, renorm="global")
    together = asked(model, held)
    found = denoise(model, "image", together.pop("input_ids"), steps=2, shift=3.0, guidance=guide, **together)
    alone = []
    for document in held:
        given = asked(model, [document])
        alone.append(denoise(model, "image", given.pop("input_ids"), steps=2, shift=3.0, guidance=guide, **given))
    close(found, torch.cat(alone).double())


def test_without_guidance_one_forward_a_step(model, monkeypatch):
    given = asked(model, [drawing(True)])
    calls = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **kwargs: calls.append(1) or forward(**kwargs))
    denoise(model, "image", given.pop("input_ids"), steps=4, **given)
    assert len(calls) == 5, "what stands before the picture, then a forward a step"


def test_sizes_that_do_not_fit_are_refused(model):
    given = asked(model, [drawing(False)])
    with pytest.raises(InputError, match=r"picture 0 of 'image' has 6 positions, and sizes make it 2 x 2"):
        denoise(model, "image", given.pop("input_ids"), **{**given, "sizes": [(2, 2)]})


def test_text_about_pictures_is_the_greedy_walk(model, weights):
    """Cached, token by token, two documents of different lengths at once; positions go on after a picture as one."""
    _, seen, *_ = documents()[0]
    held = [[seen, Text([5, 6])], [Text([9]), documents()[1][0], Text([7, 8, 4])]]
    given = batch(model, held, side="left")
    ids = torch.cat((given.pop("input_ids"), torch.full((2, 1), BOS)), dim=1)
    given["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
    found = model.generate(ids, **given, max_new_tokens=4, do_sample=False, eos_token_id=None, free=True)
    for row, document in enumerate(held):
        said: list[int] = []
        for _ in range(4):
            # the answer is a text without its end: drop the oracle's end token
            logits, _ = oracle.run(weights, [*document, Text(said)])
            scores = logits[-2].clone()
            scores[[151_655, 151_652]] = -torch.inf  # what would open a picture that nobody gives
            said.append(int(scores.argmax()))
        assert found[row, ids.shape[1] :].tolist() == said
