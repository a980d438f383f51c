"""Cosmos3 at a tiny size beside its references: diffusers' of both towers, transformers' of the reasoner.

All three read one published folder, which our model wrote.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from omnimoe import InputError
from omnimoe.convert import to_published
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.zoo.cosmos3.convert import COSMOS3, VISION
from omnimoe.zoo.cosmos3.layout import Scene, lay_out, to_latent
from tests.zoo.cosmos3.peer import cases
from tests.zoo.cosmos3.tiny import KINDS, Sample, asked, batch, generator, make_model, reasoner, samples
from tests.zoo.weights import close

pytest.importorskip("diffusers", reason="pip install 'omnimoe[diffusers]'")


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind) -> OmniMoeForCausalLM:
    return make_model(kind)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    made = tmp_path_factory.mktemp("published") / "cosmos3"
    to_published(model, made)
    return made


@pytest.fixture(scope="module")
def peers(kind, folder) -> tuple[Any, Any]:
    return reasoner(kind, folder), generator(kind, folder)


def said(peer: Any, sample: Sample) -> Tensor:
    """Logits of transformers' reasoner over the words of a sample."""
    ids = torch.tensor([list(sample.scene.ids)])
    given: dict[str, Any] = {}
    if sample.pictures:
        patches, grids = zip(*sample.pictures, strict=True)
        given = {"pixel_values": torch.cat(patches), "image_grid_thw": torch.stack(grids)}
        given["mm_token_type_ids"] = (ids == 100).int()
    return peer(input_ids=ids, **given).logits[0]


def drawn(peers: tuple[Any, Any], sample: Sample) -> dict[str, Tensor]:
    """What diffusers' generator predicts, by modality; pictures that are seen enter as transformers' reasoner has them.

    diffusers' forward takes words alone, so with pictures its layers are called here one by one.
    """
    reader, peer = peers
    given = asked(sample)
    if not sample.pictures:
        out = peer(**given)
        sound = None if out.sound is None else out.sound[0].T
        return {"video": out.sample[0][0], "sound": sound, "action": None if out.action is None else out.action[0]}
    ids = torch.tensor([list(sample.scene.ids)])
    patches, grids = (torch.cat([p[0] for p in sample.pictures]), torch.stack([p[1] for p in sample.pictures]))
    features = reader.model.get_image_features(patches, grids)
    held = ids[0] == 100
    und = peer.embed_tokens(ids[0]).masked_scatter(held.unsqueeze(1), torch.cat(list(features.pooler_output)))
    deep = [torch.cat(list(part)) for part in getattr(features, "deepstack_features", None) or []]
    places, _ = reader.model.get_rope_index(input_ids=ids, mm_token_type_ids=held[None].int(), image_grid_thw=grids)
    start = float(places.max()) + 1 + 15_000
    later = given["position_ids"][:, len(ids[0]) :] - (len(ids[0]) + 15_000) * torch.tensor([[1.0], [0], [0]])
    later = later + start * torch.tensor([[1.0], [0], [0]])
    cos, sin = (
        part.squeeze(0) for part in peer.rotary_emb(torch.cat((places[:, 0], later), 1)[:, None], "cpu", und.dtype)
    )
    gen, shapes = peer._patchify_and_pack_latents(given["vision_tokens"])
    code = peer.time_embedder(peer.time_proj(given["vision_timesteps"] * 0.001))
    gen = peer.proj_in(gen) + code  # the whole clip carries noise
    split = len(und)
    for index, layer in enumerate(peer.layers):
        und, gen = layer(und, gen, (cos[:split], sin[:split], cos[split:], sin[split:]))
        if index < len(deep):
            und = und.masked_scatter(held.unsqueeze(1), und[held] + deep[index])
    rows = peer.proj_out(peer.norm_moe_gen(gen))
    found = peer._unpatchify_and_unpack_latents(
        rows, given["vision_token_shapes"], given["vision_noisy_frame_indexes"], shapes
    )
    return {"video": found[0][0]}


def compare(model: OmniMoeForCausalLM, peers: tuple[Any, Any], held: list[Sample], side: str = "left") -> int:
    """Holds a batch to the references, sample by sample; how many parts that are generated were compared."""
    given = batch(model, held, side)
    with torch.no_grad():
        out = model(**given)
        for row, sample in enumerate(held):
            at = int(given["attention_mask"][row].argmax())
            close(out.logits[row, at : at + len(sample.scene.ids)], said(peers[0], sample))
        return compare_generated(out.predictions or {}, peers, held)


def compare_generated(predictions: dict[str, Tensor], peers: tuple[Any, Any], held: list[Sample]) -> int:
    """Holds the rows of each modality to what diffusers predicts of each sample; how many parts were compared."""
    start = dict.fromkeys(("video", "sound", "action"), 0)
    compared = 0
    for sample in held:
        shape = sample.scene.video
        counts = {"video": torch.Size(shape).numel() if shape else 0}
        counts |= {"sound": sample.scene.sound, "action": sample.scene.action}
        wanted = drawn(peers, sample) if shape else {}
        for name, count in counts.items():
            if not count:
                continue
            mine = predictions[name][start[name] : start[name] + count]
            start[name] += count
            compared += 1
            if name == "video":
                mine = to_latent(mine.view(*shape, -1), sample.latent.shape[2:])
                close(mine[:, sample.noisy], wanted[name][:, sample.noisy])
            elif not (name == "action" and sample.acted):
                close(mine, wanted[name])
    return compared


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_everything(kind, model, peers, side):
    assert compare(model, peers, samples(kind), side) == (8 if kind == "cosmos3_omni" else 6)


@pytest.mark.parametrize("lacking", ["pictures", "latent", "both", "words of the others"])
def test_a_batch_without_one_kind(kind, model, peers, lacking):
    held = samples(kind, seed=1)
    if lacking in ("pictures", "both"):
        held = [sample for sample in held if not sample.pictures]
    if lacking in ("latent", "both"):
        held = [sample for sample in held if sample.latent is None]
    if lacking == "words of the others":
        held = held[2:3]
    assert held
    compare(model, peers, held)


@torch.no_grad()
def test_places_are_found_without_being_told(kind, model):
    held = [sample for sample in samples(kind) if not sample.scene.video]
    given = batch(model, held)
    wanted = model(**given).logits[given["attention_mask"].bool()]
    given.pop("position_ids")
    given.pop("modality_ids")
    assert torch.equal(model(**given).logits[given["attention_mask"].bool()], wanted)


@torch.no_grad()
def test_a_clip_that_is_seen_enters_picture_by_picture(kind, model, peers):
    """transformers takes a clip and cuts it; here each picture of it, two frames in Nano, is one by itself."""
    frames, width = 2, 3 * 16 * (2 if kind == "cosmos3_omni" else 1)
    patches = torch.randn(frames * 8, width, generator=torch.Generator().manual_seed(4))
    ids = torch.tensor([[5, 6, 102, 101, 101, 103, 7, 102, 101, 101, 103, 8]])
    wanted = peers[0](
        input_ids=ids,
        pixel_values_videos=patches,
        video_grid_thw=torch.tensor([[frames, 4, 2]]),
        mm_token_type_ids=2 * (ids == 101).int(),
    ).logits
    encoder = model.model.modalities["vision"].get_encoder()
    close(model(ids, features={"vision": encoder.pad(patches, torch.tensor([[1, 4, 2]] * frames))}).logits, wanted)


def gradients(model: OmniMoeForCausalLM, peer_grads: dict[str, Tensor | None]) -> int:
    """Compares gradients under the published names; how many were there."""
    named, compared = dict(model.named_parameters()), 0
    scale = max(float(held.norm()) for held in peer_grads.values() if held is not None)
    for piece in COSMOS3.plan(model).pieces:
        if piece.published not in peer_grads:
            continue
        wanted, found = peer_grads[piece.published], named[piece.ours].grad
        if wanted is None:
            assert found is None or float(piece.place(found).abs().max()) == 0, piece.published
            continue
        wanted = piece.change.into(wanted)
        assert (piece.place(found) - wanted).norm() < 1e-5 * wanted.norm() + 1e-7 * scale, piece.published
        compared += 1
    return compared


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chosen", [[4], [2, 4], [2]], ids=["actions", "a padded batch", "no actions"])
def test_gradients_of_what_is_generated(kind, folder, chosen, side):
    """They reach the keys and values of the first tower, and nothing of its last layer behind them."""
    model, peer = make_model(kind), generator(kind, folder)
    held = [samples(kind)[number] for number in chosen]
    out = model(**batch(model, held, side))
    mine = sum(rows.square().sum() for name, rows in out.predictions.items() if name != "video")
    theirs, start = torch.zeros(()), 0
    for sample in held:
        count = torch.Size(sample.scene.video).numel()
        rows = out.predictions["video"][start : start + count].view(*sample.scene.video, -1)
        start += count
        mine = mine + to_latent(rows, sample.latent.shape[2:])[:, sample.noisy].square().sum()
        wanted = peer(**asked(sample))
        theirs = theirs + wanted.sample[0][0][:, sample.noisy].square().sum()
        parts = (wanted.action, wanted.sound)
        theirs = theirs + sum(part[0].square().sum() for part in parts if part is not None)
    mine.backward()
    theirs.backward()
    last = f"layers.{model.config.num_layers - 1}."
    grads = {name: held.grad for name, held in peer.named_parameters()}
    assert float(grads[f"{last}mlp.up_proj.weight"].abs().max()) == 0
    assert float(grads[f"{last}self_attn.to_k.weight"].abs().max()) > 0
    assert gradients(model, grads) > 70 - 24 * (kind == "cosmos3_edge")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chosen", [[3], [0, 3], [0]], ids=["a picture", "a padded batch", "words alone"])
def test_gradients_of_what_is_said(kind, folder, chosen, side):
    model, peer = make_model(kind), reasoner(kind, folder)
    held = [samples(kind)[number] for number in chosen]
    given = batch(model, held, side)
    logits = model(**given).logits
    mine = theirs = torch.zeros(())
    for row, sample in enumerate(held):
        mix = torch.randn(len(sample.scene.ids), 120, generator=torch.Generator().manual_seed(3))
        mine = mine + (logits[row][given["attention_mask"][row].bool()] * mix).mean()
        theirs = theirs + (said(peer, sample) * mix).mean()
    mine.backward()
    theirs.backward()
    grads = {}
    for name, held in peer.named_parameters():
        name = name.removeprefix("model.language_model.")
        if kind == "cosmos3_edge":
            name = name.replace("fc1", "up_proj").replace("fc2", "down_proj") if name.startswith("layers.") else name
            name = f"{VISION}{name}" if name.startswith("model.") else name
        elif name.startswith("model.visual."):
            name = f"{VISION}{name.removeprefix('model.visual.')}"
        for site in ("q", "k", "v"):
            name = name.replace(f"self_attn.{site}_proj.", f"self_attn.to_{site}.") if name[:6] == "layers" else name
            name = name.replace(f"self_attn.{site}_norm.", f"self_attn.norm_{site}.")
        name = name.replace("self_attn.o_proj.", "self_attn.to_out.")
        grads[name] = held.grad
    assert gradients(model, grads) > (60 if 3 in chosen else 30)


@torch.no_grad()
def test_no_word_sees_what_is_generated(kind, model):
    sample = samples(kind)[2]
    words = Sample(type(sample.scene)(ids=sample.scene.ids))
    alone, together = model(**batch(model, [words])), model(**batch(model, [sample]))
    length = len(sample.scene.ids)
    assert torch.allclose(together.logits[:, :length], alone.logits, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("chosen", [1, 2, 4], ids=["with pictures seen", "with sound", "with actions"])
def test_the_words_are_computed_once_for_all_steps(kind, model, peers, chosen):
    """Of a padded batch: words in two pieces into a cache, then two steps at different times over it."""
    sample = samples(kind)[chosen]
    ids = sample.scene.ids
    fewer = dataclasses.replace(sample.scene, ids=[token for token in ids if token < 100][1:], seen=[])
    held = [sample, dataclasses.replace(sample, scene=fewer, pictures=[])]
    given = batch(model, held)
    cut, parts = len(ids), dict(given["features"])
    columns = ("input_ids", "modality_ids", "position_ids")
    seen = {"vision": parts.pop("vision")} if sample.pictures else {}
    pictures = max((place for place, token in enumerate(ids) if token >= 100), default=0)
    cache = None
    for start, stop in ((0, pictures + 1), (pictures + 1, cut)):
        out = model(
            **{name: given[name][:, start:stop] for name in columns},
            attention_mask=given["attention_mask"][:, :stop],
            features=seen or None,
            past_key_values=cache,
            use_cache=True,
        )
        cache, seen = out.past_key_values, {}
    for time in (sample.time, sample.time / 2):
        steps = [dataclasses.replace(one, time=time) for one in held]
        out = model(
            **{name: given[name][:, cut:] for name in columns},
            attention_mask=given["attention_mask"],
            features=parts,
            timesteps=batch(model, steps)["timesteps"],
            past_key_values=cache,
        )
        assert compare_generated(out.predictions, peers, steps) >= 2
        cache.crop(cut - given["input_ids"].shape[1])


@torch.no_grad()
@pytest.mark.parametrize("lacking", ["nothing", "pictures"])
def test_words_one_by_one_after_pictures(kind, model, peers, lacking):
    """Of a padded batch, the prompt into a cache and then word by word: the logits of each step."""
    held = [sample for sample in samples(kind) if not sample.scene.video]
    if lacking == "pictures":
        held = [Sample(Scene(ids=[9, 8, 7, 6])), *(sample for sample in held if not sample.pictures)]
    words = torch.randint(3, 90, (len(held), 3), generator=torch.Generator().manual_seed(5))
    grown = [
        dataclasses.replace(sample, scene=dataclasses.replace(sample.scene, ids=[*sample.scene.ids, *more]))
        for sample, more in zip(held, words.tolist(), strict=True)
    ]
    given = batch(model, grown)
    ids, features = given["input_ids"], given.get("features")
    wanted = [said(peers[0], sample) for sample in grown]
    cache, first, width = None, ids.shape[1] - 3, ids.shape[1]
    for start, stop in itertools.pairwise([0, *range(first, width + 1)]):
        mask = given["attention_mask"][:, :stop]
        places = given["position_ids"][:, start:stop]
        piece = {"attention_mask": mask, "position_ids": places, "features": features}
        out = model(ids[:, start:stop], **piece, past_key_values=cache, use_cache=True)
        cache, features = out.past_key_values, None
        for row, logits in enumerate(wanted):
            count = min(stop - start, len(logits) - (width - stop))
            end = len(logits) - (width - stop)
            close(out.logits[row, -count:], logits[end - count : end])


@torch.no_grad()
def test_greedy_words_after_pictures(kind, model, peers):
    """Greedy text of a padded batch, as transformers generates it one by one."""
    held = [sample for sample in samples(kind) if not sample.scene.video]
    given = batch(model, held)
    found = model.generate(
        given["input_ids"],
        attention_mask=given["attention_mask"],
        features=given.get("features"),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        suppress_tokens=[100, 101, 102, 117, 118, 119],
    )
    for row, sample in enumerate(held):
        ids = list(sample.scene.ids)
        for _ in range(5):
            logits = said(peers[0], Sample(type(sample.scene)(ids=ids, seen=sample.scene.seen), sample.pictures))[-1]
            logits[[100, 101, 102, 117, 118, 119]] = -torch.inf
            ids.append(int(logits.argmax()))
        assert found[row, -5:].tolist() == ids[-5:]


@torch.no_grad()
def test_what_one_modality_becomes(kind, model):
    """``encode`` of pictures that are seen, each alone, and of actions."""
    sample = samples(kind)[3]
    given = batch(model, [sample])
    found = model.encode("vision", given["features"]["vision"])
    ids = torch.full((1, found.shape[1]), 100)
    wanted = model.model(ids, features=given["features"]).last_hidden_state
    torch.testing.assert_close(found, wanted)
    rows = {"rows": torch.randn(2, 3, 5), "domains": torch.tensor([0, 2])}
    assert model.encode("action", rows, pool="mean").shape == (2, model.config.hidden_size)


@pytest.mark.slow
@torch.no_grad()
def test_larger_copies_to_be_timed_agree(kind):
    for name, (ours, theirs) in cases(kind).items():
        first, again, wanted = ours(), ours(), theirs()
        close(first, wanted)
        assert torch.allclose(first, again), f"{name} can be repeated"


def test_what_does_not_fit_a_layout_is_refused(kind, model):
    wrong = [
        (Scene(ids=[]), "scene 0 needs words"),
        (Scene(ids=[5, 100, 100]), "become 0 rows, and the sequence has 2 positions whose modality is 'vision'"),
        (Scene(ids=[5], seen=[(1, 1, 1)]), "become 1 rows, and the sequence has 0 positions"),
        (Scene(ids=[100, 5, 100], seen=[(1, 1, 2)]), "do not stand side by side"),
    ]
    if kind == "cosmos3_edge":
        wrong.append((Scene(ids=[5], sound=3), "asks for sound, and the model makes text, vision, video, action"))
    for scene, message in wrong:
        with pytest.raises(InputError, match=message):
            lay_out(model.config, [scene])
