"""What a seed gives, its upcycled models give: for every family, and every way to upcycle."""

from __future__ import annotations

import copy

import pytest
import torch

from omnimoe import SpanProcessor, from_pretrained, load, upcycle
from omnimoe.backbone import LayerRange
from omnimoe.experts import FeedForward, RoutedExperts
from omnimoe.freeze import frozen_rows
from omnimoe.modalities import Patches, Tokens
from omnimoe.routers import ByModalityRouter, TopKRouter
from omnimoe.train import TrainSettings, make_optimizer
from tests.declarations import ids_like
from tests.upcycle.seeds import OWN, PUBLISHED, seed_of, text_of

IMAGE, BOTH = {"image": 12}, {"image": 12, "speech": 8}
WAYS = {
    "two": {"modalities": IMAGE},
    "three": {"modalities": BOTH, "towers": "modality"},
    "three, two towers": {"modalities": BOTH, "towers": (0, 1, 1)},
    "norms": {"modalities": IMAGE, "towers": {"norm": "modality", "final_norm": "modality"}},
    "front": {"modalities": BOTH, "markers": "front", "towers": {"attention": "modality"}},
    "untied": {"modalities": IMAGE, "tie": False},
    "roles": {"keys": ("und", "gen"), "towers": "modality"},
}


def is_routed(seed) -> bool:
    return any(isinstance(block.experts, RoutedExperts.Config) for block in seed.config.blocks)


@pytest.mark.parametrize("way", ["two", "three", "three, two towers", "front", "roles"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_text_logits_of_published_seeds_stay(name, way):
    seed, asked = seed_of(name), WAYS[way]
    if way == "three, two towers" and is_routed(seed):
        asked = asked | {"towers": {"attention": (0, 1, 1), "norm": (0, 1, 1)}}
    model, report = upcycle(seed, batch=text_of(seed), return_report=True, **asked)
    assert report.is_preserved
    # grouping by key may only change the order in which a matrix product sums
    grouped = is_routed(seed) and way in ("three", "roles")
    assert report.measured.difference <= (2e-5 if grouped else 0)
    ids = text_of(seed, seed=1)
    keys = {"key_ids": torch.randint(0, 2, ids.shape)} if way == "roles" else {}
    rows = torch.arange(seed.config.vocab_size) + report.vocabulary.offset
    with torch.no_grad():
        found = model(ids + report.vocabulary.offset, **keys).logits[..., rows]
        torch.testing.assert_close(found, seed(ids).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["text", "text_tied", "text_post"])
@pytest.mark.parametrize("way", WAYS)
def test_text_logits_of_our_own_stay(name, way):
    seed = seed_of(name)
    report = upcycle(seed, batch=text_of(seed), return_report=True, **WAYS[way])[1]
    assert report.is_preserved
    assert report.measured.difference == 0
    assert report.measured.loss == report.measured.new_loss <= report.measured.open_loss


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "deepseek_v3", "gpt_oss"])
def test_every_tower_starts_as_the_text_tower(name):
    """Rows of a new modality get what rows of text would: on mixed sequences too."""
    seed = seed_of(name)
    model = upcycle(seed, modalities=BOTH, towers="modality")
    ids = text_of(seed)
    mixed = torch.randint(0, 3, ids.shape)
    with torch.no_grad():
        wanted = seed(ids).logits
        found = model(ids, modality_ids=mixed).logits[..., : seed.config.vocab_size]
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "way"), [("dense", None), ("mot", None), ("merged", None), ("mot", "video"), ("moe", None)]
)
def test_seeds_of_several_modalities(name, way):
    seed = seed_of(name)
    start_from = {"video": "image"} if way else {}
    model, report = upcycle(seed, modalities={"video": 10}, start_from=start_from, return_report=True)
    assert report.is_preserved
    ids = ids_like(seed.config)
    with torch.no_grad():
        wanted = seed(ids).logits
        assert torch.equal(model(ids).logits[..., : wanted.shape[-1]], wanted)
        kinds = seed.model.modality_ids_of(ids)
        source = int(bool(way))
        moved = kinds.where(kinds != source, 3)
        found = model(ids, modality_ids=moved).logits[..., : wanted.shape[-1]]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_seed_stays_as_it_is():
    seed = seed_of("text")
    before = {name: held.clone() for name, held in seed.state_dict().items()}
    state, config = torch.get_rng_state(), copy.deepcopy(seed.config.to_dict())
    model = upcycle(seed, modalities=IMAGE, towers="modality", freeze=["text"])
    assert torch.equal(torch.get_rng_state(), state)
    assert seed.config.to_dict() == config
    assert all(torch.equal(held, before[name]) for name, held in seed.state_dict().items())
    assert all(weight.requires_grad and frozen_rows(weight) is None for weight in seed.parameters())
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    assert all(torch.equal(held, before[name]) for name, held in seed.state_dict().items())
    again = upcycle(seed, modalities=IMAGE, towers="modality")
    once = upcycle(seed, modalities=IMAGE, towers="modality")
    assert all(torch.equal(held, once.state_dict()[name]) for name, held in again.state_dict().items())
    other = upcycle(seed, modalities=IMAGE, rng_seed=1)
    assert not torch.equal(other.lm_head.weight, once.lm_head.weight)


LEARNS = {
    "towers": {"modalities": BOTH, "towers": "modality"},
    "experts": {"modalities": IMAGE, "experts": {"text": 2, "image": 4}},
    "both": {"modalities": IMAGE, "towers": "modality", "experts": {"text": 4, "image": 2}},
    "latents": {"modalities": [Patches.Config(name="latent", channels=6, objective="flow")], "towers": "modality"},
}


@pytest.mark.parametrize("frozen", [(), ("text",)], ids=["free", "frozen"])
@pytest.mark.parametrize("way", LEARNS)
@pytest.mark.parametrize("name", ["text_tied", "mixtral"])
def test_new_parts_learn_and_frozen_ones_stay(name, way, frozen, tmp_path):
    seed = seed_of(name)
    asked = LEARNS[way]
    if name == "mixtral" and "experts" in asked:
        asked = asked | {"experts": {"text": 4, "image": 8}}
    model = upcycle(seed, freeze=frozen, **asked)
    config, ids = model.config, text_of(seed)
    given = {}
    if way == "latents":
        place = config.modalities[1].placeholder_id
        ids[:, 3:6] = place
        count = int((ids == place).sum())
        given = {"features": {"latent": torch.randn(count, 6)}, "timesteps": {"latent": torch.full((count,), 0.5)}}
        given["targets"] = {"latent": torch.randn(count, 6)}
        labels = ids.masked_fill(ids == place, -100)
    else:
        held = config.token_ranges["image"]
        ids[:, 4:9] = torch.randint(held.start, held.stop, (2, 5))
        if "speech" in config.token_ranges:
            ids[:, 1:3] = config.token_ranges["speech"].start
        labels = ids
    text = text_of(seed, seed=1)
    with torch.no_grad():
        wanted = model(text).logits[..., 8 : seed.config.vocab_size]
    optimizer = make_optimizer(model, TrainSettings(learning_rate=0.01, weight_decay=0.5))
    model.train()
    losses = []
    for _ in range(3):
        out = model(ids, labels=labels, **given)
        out.loss.backward()
        assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
        if not losses:
            banks = {n: w for n, w in model.named_parameters() if "layers" in n and "scorer" not in n}
            still = [n for n, w in banks.items() if w.requires_grad and not w.grad.flatten(1)[-1].abs().max() > 0]
            assert all("experts" in n or "shared" in n for n in still), still
            assert not still or "experts" in asked or name == "mixtral"
        losses.append(out.loss.item())
        optimizer.step()
        optimizer.zero_grad()
        model.update_routers(out.routings)
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        after = model(text).logits[..., 8 : seed.config.vocab_size]
    assert torch.equal(after, wanted) == bool(frozen)
    model.save_pretrained(tmp_path)
    back = from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(back(text).logits[..., 8 : seed.config.vocab_size], after)
    assert model.config.name_or_path == ""
    back.config.name_or_path = ""
    assert back.config.to_dict() == model.config.to_dict()


def test_a_folder_and_a_meta_model_are_seeds_too(tmp_path):
    seed = seed_of("llama")
    seed.save_pretrained(tmp_path)
    model = upcycle(tmp_path, modalities=IMAGE)
    with torch.no_grad():
        ids = text_of(seed)
        assert torch.equal(model(ids).logits[..., : seed.config.vocab_size], seed(ids).logits)
    large = upcycle(load("mixtral_8x7b", device="meta"), modalities={"image": 8192}, towers="modality")
    assert next(large.parameters()).is_meta
    layer = large.model.backbone.layers[0]
    assert len(layer.mlp.experts.down_proj) == 16
    assert len(layer.self_attn.q_proj.weight) == 2


def test_ranges_of_layers():
    seed = seed_of("text")
    sparse = RoutedExperts.Config(num_experts=4, intermediate_size=24, router=TopKRouter.Config())
    model, report = upcycle(seed, layers=[LayerRange(start=1, experts=sparse)], batch=text_of(seed), return_report=True)
    assert [type(block.experts) for block in model.config.blocks] == [FeedForward.Config, RoutedExperts.Config]
    assert report.is_preserved
    assert report.measured.difference < 1e-6


def test_dtype_mode_card_and_generation():
    seed = copy.deepcopy(seed_of("llama")).to(torch.bfloat16)
    seed.config.card = {"license": "apache-2.0"}
    seed.generation_config.temperature = 0.5
    model = upcycle(seed, modalities=IMAGE, experts={"text": 2, "image": 2})
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert not model.training
    assert model.config.card == {"license": "apache-2.0"}
    assert model.config.published == {}
    assert model.generation_config.temperature == 0.5
    ids = text_of(seed)
    taken = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert taken.shape == (2, 15)


def test_the_card_names_the_seed():
    seed = copy.deepcopy(seed_of("llama"))
    seed.config.name_or_path = "org/words"
    assert upcycle(seed, modalities=IMAGE).config.card == {"base_model": "org/words"}
    seed.config.card = {"license": "mit", "base_model": "org/earlier"}
    assert upcycle(seed, modalities=IMAGE).config.card == {"license": "mit", "base_model": "org/earlier"}


def test_the_text_tower_alone_is_the_seed(tmp_path):
    seed = seed_of("text")
    upcycle(seed, modalities=BOTH, towers="modality").save_pretrained(tmp_path)
    alone = from_pretrained(tmp_path, towers=["text"])
    ids = text_of(seed)
    with torch.no_grad():
        assert torch.equal(alone(ids).logits[..., : seed.config.vocab_size], seed(ids).logits)
    assert alone.config.modality_names == ("text",)


@pytest.mark.parametrize("markers", ["behind", "front"])
def test_spans_of_a_new_modality_are_generated(markers):
    picture = Tokens.Config(name="image", vocab_size=12, num_tokens=4)
    model = upcycle(seed_of("llama"), modalities=[picture], towers="modality", markers=markers)
    held = model.config.token_ranges["image"]
    prompt = torch.cat((torch.tensor([[20, 21, 22]]), torch.tensor([[held.begin_id]])), dim=1)
    made = model.generate(
        prompt, max_new_tokens=5, do_sample=False, logits_processor=[SpanProcessor(model.config)], eos_token_id=-1
    )
    codes, end = made[0, 4:8], int(made[0, 8])
    assert ((codes >= held.start) & (codes < held.stop)).all()
    assert end == held.end_id


def test_greedy_text_is_the_seed_s():
    seed = seed_of("qwen3")
    model = upcycle(seed, modalities=BOTH, towers="modality", row_noise=0.0)
    ids = text_of(seed)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    assert torch.equal(model.generate(ids, **options), seed.generate(ids, **options))


def test_other_fields_of_the_config():
    model = upcycle(seed_of("text"), modalities=IMAGE, mask="block_causal", bidirectional_modalities=("image",))
    assert model.config.mask == "block_causal"
    router = ByModalityRouter.Config(experts=(2, 2), router=TopKRouter.Config(top_k=1))
    model = upcycle(seed_of("text"), modalities=IMAGE, experts={"text": 2, "image": 2}, router=router)
    assert model.config.experts.router == router


def test_the_report_reads_well():
    seed = seed_of("text")
    report = upcycle(
        seed,
        modalities=IMAGE,
        towers="modality",
        experts={"text": 2, "image": 4},
        batch=text_of(seed),
        return_report=True,
    )[1]
    told = str(report)
    assert "4,560 weights became" in told
    assert "copied model.backbone.layers.*.self_attn.q_proj.weight (2x) of the seed's copies 0, 0" in told
    assert "new    model.backbone.layers.*.mlp.router.routers.1.scorer.weight (2x)" in told
    assert "exact: model.backbone.layers.*.mlp: the 2 weights of a row sum to 1" in told
    assert "14 new rows of the vocabulary" in told
    assert report.complaint == ""
    assert {row["state"] for row in report.rows()} == {"new", "copied", "kept"}
    assert sum(row["numbers"] for row in report.rows()) == sum(weight.numel for weight in report.weights)


def test_every_own_kind_is_a_seed_of_one_more_modality():
    for name in OWN:
        seed = seed_of(name)
        report = upcycle(seed, modalities={"video": 6}, batch=text_of(seed), return_report=True)[1]
        assert report.measured.difference == 0, name
