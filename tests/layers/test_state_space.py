"""State spaces: a loop over time as the oracle, padding, packing, caches, copies by key, what they cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache

import omnimoe
from omnimoe import (
    Attention,
    ConfigError,
    FeedForward,
    NoExperts,
    OmniMoeConfig,
    OmniMoeForCausalLM,
    StateSpace,
    Tokens,
    register_mask_rule,
)
from omnimoe.flops import active_params, flops, formulas, total_params
from omnimoe.layers import MASK_RULES

MAMBA = StateSpace.Config(state_size=3)
MODEL = OmniMoeConfig(
    hidden_size=16,
    num_layers=2,
    modalities=(Tokens.Config(name="text", vocab_size=20), Tokens.Config(name="image", vocab_size=12)),
    attention=MAMBA,
    experts=NoExperts.Config(),
    initializer_range=0.2,
)
UNTIED = MODEL.replace(attention=MAMBA.replace(towers="modality"))
HYBRID = UNTIED.replace(
    experts=FeedForward.Config(intermediate_size=24, towers="modality"),
    layers=(omnimoe.LayerRange(start=1, attention=Attention.Config(num_heads=2)),),
)
ALL = {"dense": MODEL, "by modality": UNTIED, "beside attention": HYBRID}
IDS = torch.tensor([[1, 2, 21, 22, 3, 4, 25, 5, 30, 7, 8]])


@pytest.fixture(scope="module")
def models() -> dict[str, OmniMoeForCausalLM]:
    return {name: build(config) for name, config in ALL.items()}


def build(config: OmniMoeConfig) -> OmniMoeForCausalLM:
    torch.manual_seed(0)
    return OmniMoeForCausalLM(config).eval()


def by_hand(mixer: StateSpace, x: Tensor, copies: list[int]) -> Tensor:
    """``(T, D)`` through the equations of the papers, one token and one channel after the other."""

    def through(site, token: int, row: Tensor) -> Tensor:
        copy = copies[token] if site.num_copies > 1 else 0
        y = site.weight[copy] @ row
        return y if site.bias is None else y + site.bias[copy]

    channels = mixer.rates.D.shape[0]
    into = [through(mixer.in_proj, token, row) for token, row in enumerate(x)]
    entered, gates = [row[:channels] for row in into], [row[channels:] for row in into]
    state, found = torch.zeros(channels, mixer.state_size), []
    for token in range(len(x)):
        mixed = mixer.conv.bias.clone()
        for back in range(min(mixer.conv_size, token + 1)):
            mixed = mixed + mixer.conv.weight[:, mixer.conv_size - 1 - back] * entered[token - back]
        u = F.silu(mixed)
        step, write, read = through(mixer.x_proj, token, u).split([mixer.step_rank, mixer.state_size, mixer.state_size])
        step = F.softplus(through(mixer.dt_proj, token, step))
        y = torch.empty(channels)
        for channel in range(channels):
            decay = torch.exp(-step[channel] * torch.exp(mixer.rates.A_log[channel]))
            state[channel] = decay * state[channel] + step[channel] * u[channel] * write
            y[channel] = read @ state[channel] + mixer.rates.D[channel] * u[channel]
        found.append(through(mixer.out_proj, token, y * F.silu(gates[token])))
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("towers", ["shared", "modality"])
def test_a_loop_over_time_and_channels(towers):
    model = build(MODEL.replace(num_layers=1, attention=MAMBA.replace(towers=towers)))
    layer = model.model.backbone.layers[0]
    torch.nn.init.normal_(layer.self_attn.conv.bias)
    x = model.model.embed_tokens(IDS[0])
    normed = F.rms_norm(x, (16,), layer.attention_norm.weight[0], 1e-5)
    wanted = x + by_hand(layer.self_attn, normed, [int(token >= 20) for token in IDS[0]])
    found = model(IDS, output_hidden_states=True).logits[0]
    wanted = model.lm_head(F.rms_norm(wanted, (16,), model.model.norm.weight[0], 1e-5))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 6], [2, 9]])
def test_pieces_through_a_cache_are_the_whole(models, name, pieces):
    model = models[name]
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        found, first = [], 0
        for size in pieces:
            found.append(model(IDS[:, first : first + size], past_key_values=cache).logits)
            first += size
        torch.testing.assert_close(torch.cat(found, dim=1), model(IDS).logits, atol=1e-5, rtol=1e-5)
        assert int(cache.get_seq_length()) == 11


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_padding_changes_nothing_wherever_it_stands(models, name):
    model = models[name]
    holes = [0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0]
    mask = torch.tensor([[0] * 6 + [1] * 11, [1] * 11 + [0] * 6, holes])
    ids = torch.zeros_like(mask).masked_scatter(mask.bool(), IDS.repeat(3, 1))
    # attention counts positions
    position_ids = (mask.cumsum(1) - 1).clamp_min(0) if name == "beside attention" else None
    wanted = model(IDS).logits.expand(3, -1, -1).flatten(0, 1)
    found = model(ids, attention_mask=mask, position_ids=position_ids).logits
    torch.testing.assert_close(found[mask.bool()], wanted, atol=1e-5, rtol=1e-5)
    cache, parts = DynamicCache(config=model.config), []
    for first, stop in ((0, 7), (7, 12), (12, 17)):
        places = None if position_ids is None else position_ids[:, first:stop]
        seen = mask[:, :stop]
        out = model(ids[:, first:stop], attention_mask=seen, position_ids=places, past_key_values=cache)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask.bool()], wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_packed_documents_do_not_see_each_other(models, name):
    model = models[name]
    segments = torch.tensor([[0] * 4 + [1] * 2 + [-1] * 2 + [2] * 3])
    found = model(IDS, segment_ids=segments).logits
    for document in range(3):
        alone = model(IDS[segments == document][None]).logits[0]
        torch.testing.assert_close(found[segments == document], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_beams_and_left_padded_prompts_generate(models, name):
    model = models[name]
    prompts = torch.cat((IDS[:, :6], torch.tensor([[0, 0, 0, 1, 2, 21]])))
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for more in ({}, {"num_beams": 3}):
        cached = model.generate(prompts, attention_mask=mask, **options, **more)
        again = model.generate(prompts, attention_mask=mask, **options, **more, use_cache=False)
        assert torch.equal(cached, again)
        alone = model.generate(prompts[1:, 3:], **options, **more)
        assert torch.equal(cached[1:, 3:], alone)
    static = model.generate(prompts, attention_mask=mask, **options, cache_implementation="static")
    assert torch.equal(static, model.generate(prompts, attention_mask=mask, **options))


@torch.no_grad()
def test_equal_copies_are_the_shared_model(models):
    shared, untied = models["dense"], build(UNTIED)
    held = dict(shared.named_parameters())
    for name, parameter in untied.named_parameters():
        parameter.copy_(held[name].expand_as(parameter))
    torch.testing.assert_close(untied(IDS).logits, shared(IDS).logits, atol=1e-6, rtol=1e-6)
    mixer = untied.model.backbone.layers[1].self_attn
    mixer.out_proj.weight[1].zero_()
    changed = (untied(IDS).logits - shared(IDS).logits).abs().amax(-1)[0] > 1e-4
    assert changed.tolist() == [False, False, True, True, False, False, True, False, True, False, False]


@pytest.mark.parametrize("site", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_a_site_alone_may_have_copies(site):
    mixer = build(MODEL.replace(attention=MAMBA.replace(site_towers={site: "modality"}))).model.backbone.layers[0]
    copies = {name: getattr(mixer.self_attn, name).num_copies for name in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    assert copies == {**dict.fromkeys(copies, 1), site: 2}


def test_every_weight_takes_part_even_without_a_modality():
    model = build(UNTIED.replace(attention=UNTIED.attention.replace(bias=True))).train()
    text = IDS[IDS < 20][None]
    model(text, labels=text).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        if "_proj" in name:
            assert parameter.grad[0].any()
            assert not parameter.grad[1].any()


def test_gradients_under_padding_are_those_of_the_sequence_alone():
    model = build(UNTIED).train()
    padded = F.pad(IDS, (3, 2))
    mask = F.pad(torch.ones_like(IDS), (3, 2))
    found = []
    for batch in ({"input_ids": IDS}, {"input_ids": padded, "attention_mask": mask}):
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-5, rtol=1e-4, msg=name)


def test_how_it_starts():
    mixer = build(MODEL.replace(hidden_size=64, attention=StateSpace.Config(towers="modality"))).model.backbone.layers[
        0
    ]
    mixer = mixer.self_attn
    torch.testing.assert_close(mixer.rates.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    assert (mixer.rates.D == 1).all()
    steps = F.softplus(mixer.dt_proj.bias)
    assert 1e-3 - 1e-6 <= steps.min() < 3e-3 < 3e-2 < steps.max() <= 0.1 + 1e-6
    assert torch.equal(steps[0], steps[1])
    assert 0.4 < mixer.dt_proj.weight.abs().max() <= 0.5
    assert 0.4 < mixer.conv.weight.abs().max() <= 0.5


@pytest.mark.parametrize("name", ["dense", "by modality"])
def test_what_it_costs(models, name):
    model = models[name]
    with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        model(IDS, labels=IDS).loss.backward()
    assert flops(model, IDS, backward=True).total == counter.get_total_flops()
    assert total_params(model.config) == sum(parameter.numel() for parameter in model.parameters())
    assert active_params(model.config) == total_params(MODEL)
    longer = flops(model.config, sequence_length=64).per_token
    assert flops(model.config, sequence_length=8).per_token == longer, "a state does not grow"


def test_a_traced_graph_gives_the_same():
    model = build(UNTIED)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    mask = torch.tensor([[0] * 4 + [1] * 7])
    with torch.no_grad():
        for batch in ({"input_ids": IDS}, {"input_ids": IDS, "attention_mask": mask}):
            torch.testing.assert_close(compiled(**batch).logits[:, 4:], model(**batch).logits[:, 4:])


def test_recomputed_layers_have_the_same_gradients():
    model = build(UNTIED).train()
    found = []
    for recomputed in (False, True):
        if recomputed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_half_precision_keeps_the_state_in_float32(models):
    model = build(UNTIED)
    wanted = model(IDS).logits
    model.bfloat16()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        found = model(IDS, past_key_values=cache).logits
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32
    assert (found.float() - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_size": 0}, "state_size must be at least 1, got 0"),
        ({"conv_size": 1}, "conv_size must be at least 2, got 1"),
        ({"step_min": 0.2}, "step_min at most step_max, got step_min 0.2"),
        ({"site_towers": {"q_proj": "modality"}}, "unknown sites .'q_proj'. in site_towers; known: in_proj"),
    ],
)
def test_refused_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        MAMBA.replace(**changes)


@pytest.fixture
def nearby():
    register_mask_rule("nearby", is_causal=True)(
        lambda query, key: (query.order >= key.order) & (query.order < key.order + 3)
    )
    yield
    MASK_RULES.remove("nearby")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"mask": "bidirectional"}, "'bidirectional'"),
        ({"mask": "one_way"}, "'one_way'"),
        ({"mask": "nearby"}, "'nearby'"),
        ({"mask": "block_causal", "private_blocks": True}, "private blocks"),
    ],
)
def test_masks_that_hide_the_past_are_refused(nearby, changes, what):
    with pytest.raises(ConfigError, match=f"forward in time, which .*{what} would not allow; set mask='causal'"):
        MODEL.replace(**changes)


def test_private_blocks_by_hand_are_refused(models):
    model = build(MODEL.replace(mask="block_causal", bidirectional_modalities=("image",)))
    blocks = torch.full_like(IDS, -1)
    model(IDS, block_ids=blocks)
    with pytest.raises(ValueError, match="block_ids holds -2, a private block, which a state space cannot hide"):
        model(IDS, block_ids=blocks.index_fill(1, torch.tensor([2, 3]), -2))


def test_a_cache_without_places_for_states_is_refused(models):
    with pytest.raises(ValueError, match="layer 0 keeps a state.* make it from the model's config"):
        models["dense"](IDS, past_key_values=DynamicCache())


def test_drafts_are_refused(models):
    with pytest.raises(ValueError, match="stateful"):
        models["dense"].generate(IDS, prompt_lookup_num_tokens=2, max_new_tokens=3)
