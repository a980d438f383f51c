"""Experts in attention: against loops over rows, against the tower maps that they contain, and what sees them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import omnimoe
from omnimoe import LayerRange, OmniMoeConfig, Tokens, active_params, flops, upcycle
from omnimoe.config import ConfigError
from omnimoe.data import Corpus
from omnimoe.experts import FeedForward, RoutedAttention, RoutedExperts, RoutedProjections, RoutedStateSpace
from omnimoe.flops import UnknownCostError, total_params
from omnimoe.layers import (
    ATTENTIONS,
    Attention,
    AttentionMask,
    Rope,
    RowLayout,
    SinkAttention,
    StateSpace,
    SubNormAttention,
    register_attention,
)
from omnimoe.routers import (
    AttributeRouter,
    ByModalityRouter,
    ExpertChoiceRouter,
    SoftRouter,
    StaticRouter,
    TopKRouter,
)
from omnimoe.train import RouterError, Training
from tests.declarations import DECLARATIONS, DENSE, MOT, build, copy_weights, ids_like, routed
from tests.train.runs import build as started
from tests.train.runs import settings, tiny
from tests.upcycle.seeds import seed_of, text_of

KEYS = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 1, 0]])
HEADS = {"own_heads": True}


def make(**fields) -> RoutedAttention:
    given = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "num_experts": 3, "bias": True, "output_bias": True}
    torch.manual_seed(0)
    layer = RoutedAttention.Config(**(given | fields)).build(hidden_size=8, num_modalities=2, layer_idx=0)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.4)
    return layer.double()


def called(layer: RoutedAttention, x: torch.Tensor):
    """``(B, T, D)`` there and back, with the layout and the routing."""
    rows = RowLayout.build(KEYS, num_keys=2)
    positions = rows.to_rows(torch.arange(6).expand(2, 6)).unsqueeze(1)
    if layer.rope is not None:
        rows = rows.with_rotary(*Rope(layer.rope, head_dim=layer.head_dim).table(positions))
    mask = AttentionMask(
        rule="causal", query_length=6, key_length=6, past_length=0, device=torch.device("cpu"), key_ids=KEYS
    )
    y, _, routing = layer(rows.to_rows(x), rows, mask)
    return rows.to_time(y), rows, routing


def choices(routing, rows) -> dict[tuple[int, int], list[tuple[int, float]]]:
    """The experts of each position and their weights, in the order of the routing."""
    found: dict = {(b, t): [] for b in range(2) for t in range(6)}
    time = torch.arange(12) if rows.time_index is None else rows.time_index
    for token, expert, weight in zip(
        routing.token_index.tolist(), routing.expert_ids.tolist(), routing.expert_weights.tolist(), strict=True
    ):
        if expert >= 0:
            found[divmod(int(time[token]), 6)].append((expert, weight))
    return found


def projected(layer: RoutedAttention, site: str, row: torch.Tensor, key: int, chosen) -> torch.Tensor:
    bank = getattr(layer, site)
    if site not in layer.declared.experts_at:
        copy = bank.towers[key]
        return F.linear(row, bank.weight[copy], None if bank.bias is None else bank.bias[copy])
    y = torch.zeros(bank.weight.shape[1], dtype=row.dtype)
    for expert, weight in chosen:
        y = y + weight * F.linear(row, bank.weight[expert], None if bank.bias is None else bank.bias[expert])
    return y


def attended(query, keys, values, groups: int) -> torch.Tensor:
    """``(H, C)`` queries over ``(t, H_kv, C)``."""
    out = []
    for head, own in enumerate(query):
        scores = torch.stack([own @ key[head // groups] for key in keys]) / own.shape[0] ** 0.5
        out.append(sum(p * value[head // groups] for p, value in zip(scores.softmax(0), values, strict=True)))
    return torch.stack(out)


ROUTERS = {
    "top 2": TopKRouter.Config(),
    "as they are, with room for some": TopKRouter.Config(normalize=False, capacity_factor=0.7),
    "experts choose": ExpertChoiceRouter.Config(capacity_factor=1.5),
    "by modality": ByModalityRouter.Config(experts=(1, 2), router=TopKRouter.Config()),
    "sets": StaticRouter.Config(experts_of_keys=((0, 2), 1), combine="sum"),
}


@pytest.mark.parametrize("sites", [(), ("v_proj", "o_proj"), ("q_proj", "k_proj")])
@pytest.mark.parametrize("name", ROUTERS)
def test_it_is_the_loop_over_rows(name, sites):
    towers = {"q_proj": "modality", "v_proj": (1, 0)}
    layer = make(
        router=ROUTERS[name],
        routed_sites=sites,
        site_towers={site: held for site, held in towers.items() if sites and site not in sites},
        rope=None,
    )
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    y, rows, routing = called(layer, x)
    chosen = choices(routing, rows)
    for b in range(2):
        put = {
            site: [projected(layer, site, x[b, t], int(KEYS[b, t]), chosen[b, t]).view(-1, 4) for t in range(6)]
            for site in ("q_proj", "k_proj", "v_proj")
        }
        for t in range(6):
            mixed = attended(put["q_proj"][t], put["k_proj"][: t + 1], put["v_proj"][: t + 1], groups=2)
            wanted = projected(layer, "o_proj", mixed.flatten(), int(KEYS[b, t]), chosen[b, t])
            torch.testing.assert_close(y[b, t], wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_with_heads_of_their_own_a_row_attends_once_for_each_expert(name):
    layer = make(router=ROUTERS[name], rope=None, **HEADS, site_towers={"k_proj": "modality"})
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    y, rows, routing = called(layer, x)
    chosen = choices(routing, rows)
    for b in range(2):
        keys, values = (
            [projected(layer, site, x[b, t], int(KEYS[b, t]), ()).view(-1, 4) for t in range(6)]
            for site in ("k_proj", "v_proj")
        )
        for t in range(6):
            wanted = torch.zeros(8, dtype=torch.float64)
            for expert, weight in chosen[b, t]:
                query = projected(layer, "q_proj", x[b, t], 0, [(expert, 1.0)]).view(-1, 4)
                mixed = attended(query, keys[: t + 1], values[: t + 1], groups=2).flatten()
                wanted = wanted + projected(layer, "o_proj", mixed, 0, [(expert, weight)])
            torch.testing.assert_close(y[b, t], wanted, atol=1e-6, rtol=1e-5)


GATES = {"plain": "none", "a sigmoid": "sigmoid", "in the softmax": "softmax"}


@pytest.mark.parametrize("heads", [{}, {"own_heads": True}], ids=["summed", "own heads"])
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_shared_and_zero_experts_stand_beside(gate, heads):
    """Every row meets the last two copies, at their weights; a choice of the free one is no choice."""
    beside = {"num_shared_experts": 2, "shared_gate": gate, "num_zero_experts": 1}
    layer = make(router=TopKRouter.Config(top_k=3, top_p=0.9), rope=None, **beside, **heads)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    y, rows, routing = called(layer, x)
    assert (routing.expert_ids == 3).any()
    chosen = choices(routing, rows)
    order = rows.time_index
    for row in range(12):
        place = divmod(int(order[row]), 6)
        given = {"none": torch.ones(2), "softmax": routing.shared_weights}
        if gate == "sigmoid":
            weights = torch.sigmoid(F.linear(rows.to_rows(x)[row].float(), layer.shared_gate.weight.float())).expand(2)
        else:
            weights = given[gate] if gate == "none" else given[gate][row]
        met = [(expert, weight) for expert, weight in chosen[place] if expert < 3]
        chosen[place] = met + [(3 + number, weight) for number, weight in enumerate(weights.tolist())]
    plain = make(router=StaticRouter.Config(experts_of_keys=(0, 1)), num_experts=5, rope=None, **heads)
    plain.load_state_dict({name: held for name, held in layer.state_dict().items() if "proj" in name})
    for b, t in ((0, 0), (1, 3), (1, 5)):
        wanted = looped(plain, x[b], KEYS[b], [chosen[b, place] for place in range(6)], t)
        torch.testing.assert_close(y[b, t], wanted, atol=1e-6, rtol=1e-5)


def looped(layer: RoutedAttention, x: torch.Tensor, keys: torch.Tensor, chosen: list, t: int) -> torch.Tensor:
    """What position ``t`` of one sequence gets, given the experts of each."""

    def heads(site: str, at: int, experts: list) -> torch.Tensor:
        return projected(layer, site, x[at], int(keys[at]), experts).view(-1, 4)

    met, values, own = [], [heads("v_proj", at, chosen[at]) for at in range(t + 1)], layer.declared.own_heads
    past = [heads("k_proj", at, chosen[at]) for at in range(t + 1)]
    if not own:
        mixed = attended(heads("q_proj", t, chosen[t]), past, values, groups=2)
        return projected(layer, "o_proj", mixed.flatten(), int(keys[t]), chosen[t])
    for expert, weight in chosen[t]:
        mixed = attended(heads("q_proj", t, [(expert, 1.0)]), past, values, groups=2).flatten()
        met.append(projected(layer, "o_proj", mixed, int(keys[t]), [(expert, weight)]))
    return torch.stack(met).sum(0)


def test_a_state_space_has_experts_and_its_towers_are_a_case_of_them():
    config = DENSE.replace(attention=StateSpace.Config(towers="modality", expand=1, state_size=4))
    chosen = RoutedStateSpace.Config(
        num_experts=3, router=StaticRouter.Config(), routed_sites=RoutedStateSpace.sites, expand=1, state_size=4
    )
    one, ids = build(config), ids_like(config)
    other = copy_weights(build(config.replace(attention=chosen)), one)
    torch.testing.assert_close(other(ids).logits, one(ids).logits)
    chosen = RoutedStateSpace.Config(num_experts=4, expand=1, state_size=4)
    model = build(DENSE.replace(attention=chosen)).train()
    out = model(ids, labels=ids)
    out.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert [len(held.expert_ids) for held in out.routings if held is not None] == [48, 48]
    model.eval()
    step, whole = model(ids[:, :6], use_cache=True), model(ids).logits
    for at in range(6, 12):
        step = model(ids[:, at : at + 1], past_key_values=step.past_key_values)
        torch.testing.assert_close(step.logits[:, 0], whole[:, at], atol=1e-5, rtol=1e-4)


def test_any_part_over_banks_can_have_experts():
    @register_attention("routed_sinks")
    class RoutedSinks(RoutedProjections, SinkAttention):
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Config(RoutedProjections.Config, SinkAttention.Config):
            """Attention with sinks and experts."""

    @register_attention("routed_normed")
    class RoutedNormed(RoutedProjections, SubNormAttention):
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Config(RoutedProjections.Config, SubNormAttention.Config):
            """Its projection out is no plain bank."""

    try:
        towers = DENSE.replace(attention=SinkAttention.Config(num_heads=4, towers="modality", window=5))
        config = DENSE.replace(
            attention=RoutedSinks.Config(num_heads=4, window=5, num_experts=3, router=StaticRouter.Config())
        )
        assert OmniMoeConfig.from_dict(config.to_dict()).attention == config.attention
        one, ids = build(towers), ids_like(DENSE)
        torch.testing.assert_close(copy_weights(build(config), one)(ids).logits, one(ids).logits)
        with pytest.raises(ConfigError, match="o_proj of RoutedNormed is NormedLinear and no plain bank"):
            build(DENSE.replace(attention=RoutedNormed.Config(num_heads=4)))
    finally:
        ATTENTIONS.remove("routed_sinks")
        ATTENTIONS.remove("routed_normed")


def test_slots_take_each_projection():
    layer = make(router=SoftRouter.Config(num_slots=2), routed_sites=("v_proj",), rope=None)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    y, _, routing = called(layer, x)
    mixed = torch.einsum("best,btd->besd", routing.slots.dispatch, x)
    worked = torch.einsum("besd,efd->besf", mixed, layer.v_proj.weight) + layer.v_proj.bias[:, None]
    values = torch.einsum("btes,besf->btf", routing.slots.combine, worked).unflatten(2, (-1, 4))
    plain = RowLayout.build(torch.zeros_like(KEYS), num_keys=1)
    query, key = (site(x.flatten(0, 1), plain).view(2, 6, -1, 4) for site in (layer.q_proj, layer.k_proj))
    for b in range(2):
        for t in range(6):
            out = attended(query[b, t], key[b, : t + 1], values[b, : t + 1], groups=2).flatten()
            torch.testing.assert_close(y[b, t], F.linear(out, layer.o_proj.weight[0], layer.o_proj.bias[0]))


def test_routed_by_modality_it_is_a_tower_map():
    """Mixture-of-Transformers' attention is the static router over these banks: one model under two declarations."""
    towers = MOT.replace(attention=MOT.attention.replace(bias=True, output_bias=True))
    attention = RoutedAttention.Config(
        num_heads=4, num_kv_heads=2, bias=True, output_bias=True, num_experts=3, router=StaticRouter.Config()
    )
    one, ids = build(towers).train(), ids_like(MOT)
    other = copy_weights(build(MOT.replace(attention=attention)).train(), one)
    found = [model(ids, labels=ids) for model in (one, other)]
    torch.testing.assert_close(found[1].logits, found[0].logits)
    for out in found:
        out.loss.backward()
    for (name, first), second in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(second.grad, first.grad, msg=name)


@pytest.mark.parametrize("heads", [{}, HEADS], ids=["summed", "own heads"])
def test_equal_experts_whose_weights_sum_to_one_are_plain_attention(heads):
    attention = RoutedAttention.Config(num_heads=4, num_kv_heads=2, num_experts=3, **heads)
    dense, ids = build(DENSE), ids_like(DENSE)
    model = build(DENSE.replace(attention=attention))

    def widened(name, value, like):
        return value.expand_as(like) if value is not None else like

    own = dense.state_dict()
    model.load_state_dict({name: widened(name, own.get(name), like) for name, like in model.state_dict().items()})
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("width", "layers", "heads", "dense", "moe"), [(768, 12, 12, 124, 167), (1024, 24, 16, 354, 505)]
)
def test_uni_perceiver_moe_counts_as_its_paper_does(width, layers, heads, dense, moe):
    """Eight experts in every matrix of every second layer, two of them met, by attributes of the key."""
    sizes = {"intermediate_size": 4 * width, "activation": "gelu", "gated": False, "bias": True}
    attention = {"num_heads": heads, "bias": True, "output_bias": True, "rope": None}
    base = OmniMoeConfig(
        hidden_size=width,
        num_layers=layers,
        modalities=(Tokens.Config(name="text", vocab_size=49411),),
        attention=Attention.Config(**attention),
        experts=FeedForward.Config(**sizes),
        tie_word_embeddings=True,
        mask="bidirectional",
    )
    router = AttributeRouter.Config(top_k=2)
    sparse = LayerRange(
        start=1,
        step=2,
        attention=RoutedAttention.Config(num_experts=8, router=router, **attention),
        experts=RoutedExperts.Config(num_experts=8, router=router, **sizes),
    )
    assert active_params(base) / 1e6 == pytest.approx(dense, abs=2.5)
    assert active_params(base.replace(layers=(sparse,))) / 1e6 == pytest.approx(moe, abs=2.5)


def test_free_experts_are_chosen_like_those_of_the_same_key_and_a_gate_is_counted():
    router = ByModalityRouter.Config(experts=(2, 2, 2), router=TopKRouter.Config(top_k=2))
    attention = RoutedAttention.Config(num_heads=4, num_experts=6, router=router, num_zero_experts=2)
    assert [attention.copies_met("q_proj", key) for key in range(3)] == [1, 1, 1]
    beside = {"num_heads": 4, "num_experts": 2, "num_shared_experts": 2}
    plain, gated = (
        DENSE.replace(attention=RoutedAttention.Config(shared_gate=gate, **beside)) for gate in ("none", "sigmoid")
    )
    assert active_params(gated) - active_params(plain) == 2 * DENSE.hidden_size
    assert active_params(plain) == total_params(plain)


@pytest.mark.parametrize("site", ["attention", "experts"])
def test_what_slots_cost_is_not_said(site):
    parts = {
        "attention": RoutedAttention.Config(num_heads=4, router=SoftRouter.Config()),
        "experts": routed(4, SoftRouter.Config()),
    }
    for count in (flops, active_params):
        with pytest.raises(UnknownCostError, match="SoftRouter.Config mixes rows, and what its slots cost a token"):
            count(DENSE.replace(**{site: parts[site]}))


def test_the_trace_the_losses_and_the_update_know_attention_from_experts():
    pytest.importorskip("matplotlib")
    bias = TopKRouter.Config(expert_bias="shared")
    attention = RoutedAttention.Config(num_heads=4, num_kv_heads=2, num_experts=3, router=bias)
    config = DENSE.replace(layers=(LayerRange(start=1, attention=attention),))
    config = config.replace(experts=dataclasses.replace(DECLARATIONS["moe"].experts, router=bias))
    model, ids = build(config).train(), ids_like(config)
    with omnimoe.record_routing(model) as trace:
        out = model(ids, labels=ids)
    assert [(found.part, found.layer, len(found.load)) for found in trace.layers()] == [
        ("experts", 0, 4),
        ("experts", 1, 4),
        ("attention", 1, 3),
    ]
    routing = out.routings[2]
    load = torch.bincount(routing.expert_ids, minlength=3).double() / len(routing.expert_ids)
    assert trace.layers()[2].load == pytest.approx(load.tolist())
    assert trace.load()[2, :, 3:].sum() == 0
    assert "\n attention 1  " in str(trace)
    figure = trace.heatmap()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[::3] == ["layer 0  text", "layer 1  text", "attention 1  text"]
    losses = [loss for held in out.routings for loss in held.losses.values()]
    torch.testing.assert_close(out.aux_loss, torch.stack(losses).sum() / 3)
    own = model.model.backbone.layers[1].self_attn.router
    before = own.expert_bias.clone()
    model.update_routers(out.routings)
    assert not torch.equal(own.expert_bias, before)
    shown = model(ids, output_router_logits=True).router_logits
    assert [held.shape for held in shown] == [(24, 4), (24, 4), (24, 3)]


def test_a_router_of_attention_that_is_not_finite_is_named():
    attention = RoutedAttention.Config(num_heads=4, num_experts=3)
    config = tiny().replace(layers=(LayerRange(start=1, attention=attention),))
    run = Training(started(config), settings(steps=2), corpus=Corpus.load("p"), show_progress=False)
    run.model.model.backbone.layers[1].self_attn.router.scorer.weight.data[0] = float("nan")
    with pytest.raises(RouterError, match="router of the attention of layer 1 is not finite at step 1.*own weights"):
        run.run()


FRESH = {
    "top 2": (RoutedAttention.Config(num_heads=4, num_kv_heads=2, num_experts=4), "exact"),
    "own heads": (RoutedAttention.Config(num_heads=4, num_kv_heads=2, num_experts=4, **HEADS), "exact"),
    "beside shared experts": (
        RoutedAttention.Config(num_heads=4, num_kv_heads=2, num_experts=4, num_shared_experts=2),
        "exact",
    ),
    "null experts": (
        RoutedAttention.Config(num_heads=4, num_kv_heads=2, num_experts=4, num_zero_experts=1),
        "changed",
    ),
    "top 1": (
        RoutedAttention.Config(num_heads=4, num_kv_heads=2, num_experts=4, router=TopKRouter.Config(top_k=1)),
        "changed",
    ),
}


@pytest.mark.parametrize("name", FRESH)
def test_attention_of_a_seed_becomes_experts(name):
    attention, function = FRESH[name]
    seed = seed_of("text")
    model, report = upcycle(
        seed, layers=(LayerRange(start=1, attention=attention),), batch=text_of(seed), return_report=True
    )
    assert [(change.where, change.function) for change in report.changes if "self_attn" in change.where] == [
        ("model.backbone.layers.1.self_attn", function)
    ]
    assert (report.measured.difference < 2e-6) == (function == "exact")
    bank = model.model.backbone.layers[1].self_attn.q_proj.weight[:4]
    held = seed.model.backbone.layers[1].self_attn.q_proj.weight
    assert torch.equal(bank, held.expand_as(bank))


def test_towers_of_a_seed_become_groups_of_experts_and_grow_on():
    router = ByModalityRouter.Config(experts=(2, 2, 1), router=TopKRouter.Config(top_k=2))
    attention = RoutedAttention.Config(num_heads=4, num_kv_heads=2, num_experts=5, router=router)
    seed, ids = seed_of("mot"), ids_like(MOT)
    asked = {"layers": (LayerRange(attention=attention),), "batch": ids, "return_report": True}
    model, report = upcycle(seed, **asked)
    assert report.is_preserved
    assert report.measured.difference < 2e-6
    towers = seed.model.backbone.layers[0].self_attn.v_proj.weight
    assert torch.equal(model.model.backbone.layers[0].self_attn.v_proj.weight, towers[[0, 0, 1, 1, 2]])
    added = {"modalities": {"depth": 4}, "start_from": {"depth": "image"}}
    grown, report = upcycle(model, **added, batch=ids, return_report=True)
    assert grown.config.blocks[0].attention.num_experts == 7
    assert report.measured.difference < 2e-6
    one = RoutedAttention.Config(num_heads=4, num_kv_heads=2, num_experts=4)
    with pytest.raises(ConfigError, match="one pool of experts would merge networks of the seed that differ by key"):
        upcycle(seed, layers=(LayerRange(attention=one),))


def told(model, attention, **asked):
    """What an upcycled model's attention is said to be, and how far its logits are from the seed's."""
    _, report = upcycle(
        model, layers=(LayerRange(attention=attention),), batch=ids_like(DENSE), return_report=True, **asked
    )
    found = {change.function for change in report.changes if "self_attn" in change.where}
    return found, report.measured.difference


def test_experts_that_meet_in_another_place_are_changed():
    summed = RoutedAttention.Config(num_heads=4, num_kv_heads=2, num_experts=4, routed_sites=("q_proj", "o_proj"))
    apart = dataclasses.replace(summed, own_heads=True)
    for one, other in ((summed, apart), (apart, summed)):
        seed = build(DENSE.replace(attention=one))
        assert told(seed, one)[1] < 2e-6
        found, difference = told(seed, other)
        assert found == {"changed"}
        assert difference > 0.1


BESIDE = {
    "a gate": ({"num_shared_experts": 2}, {"num_shared_experts": 2, "shared_gate": "sigmoid"}),
    "none": ({"num_shared_experts": 2}, {}),
    "a zero expert": ({}, {"num_zero_experts": 1}),
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("site", ["attention", "experts"])
def test_what_stands_beside_changes_the_function_and_new_shared_experts_do_not(site, name):
    def config(beside):
        if site == "experts":
            return DENSE.replace(experts=routed(4, TopKRouter.Config(), **beside))
        return DENSE.replace(attention=RoutedAttention.Config(num_heads=4, num_kv_heads=2, num_experts=4, **beside))

    def grown(seed, beside):
        part = getattr(config(beside), site)
        asked = {"layers": (LayerRange(**{site: part}),), "batch": ids_like(DENSE), "return_report": True}
        _, report = upcycle(build(config(seed)), **asked)
        return {change.function for change in report.changes}, report.measured.difference

    one, other = BESIDE[name]
    if (site, name) != ("attention", "none"):
        found, difference = grown(one, other)
        assert found == {"changed"}
        assert difference > 1e-2
    found, difference = grown({}, {"num_shared_experts": 2})
    assert found == {"exact"}
    assert difference < 2e-6


REMIXED = {
    "three for two": (
        StaticRouter.Config(experts_of_keys=(0, (1, 2), 3)),
        StaticRouter.Config(experts_of_keys=(0, (1, 2, 4), 3)),
        5,
    ),
    "sums for means": (
        StaticRouter.Config(experts_of_keys=((0, 1), 2, 3)),
        StaticRouter.Config(experts_of_keys=((0, 1), 2, 3), combine="sum"),
        4,
    ),
    "a learned router": (
        StaticRouter.Config(experts_of_keys=((0, 1), 2, 3)),
        ByModalityRouter.Config(experts=(2, 1, 1), router=TopKRouter.Config(top_k=2)),
        4,
    ),
}


@pytest.mark.parametrize("name", REMIXED)
@pytest.mark.parametrize("site", ["attention", "experts"])
def test_sets_of_experts_that_weigh_otherwise_are_changed(site, name):
    router, asked, count = REMIXED[name]

    def part(num_experts, chosen):
        if site == "experts":
            return routed(num_experts, chosen)
        return RoutedAttention.Config(num_heads=4, num_kv_heads=2, num_experts=num_experts, router=chosen)

    seed = build(DENSE.replace(**{site: part(4, router)}))
    layers = (LayerRange(**{site: part(count, asked)}),)
    _, report = upcycle(seed, layers=layers, batch=ids_like(DENSE), return_report=True)
    assert {change.function for change in report.changes} == {"changed"}
    assert report.measured.difference > 1e-2


def test_shared_experts_are_met_by_every_key(tmp_path):
    """By loading of towers, by freezing and by LoRA alike."""
    attention = RoutedAttention.Config(
        num_heads=4, num_kv_heads=2, num_experts=3, router=StaticRouter.Config(), num_shared_experts=2
    )
    config = DENSE.replace(attention=attention)
    model, ids = build(config), ids_like(config)
    model.save_pretrained(tmp_path)
    alone = omnimoe.from_pretrained(tmp_path, towers=["image"])
    held, bank = (part.model.backbone.layers[0].self_attn.v_proj.weight for part in (model, alone))
    assert torch.equal(bank, held[[1, 3, 4]])
    model.train()
    omnimoe.freeze(model, ["text"])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = omnimoe.keep_frozen(torch.optim.AdamW(model.parameters(), lr=1e-2))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    now = model.model.backbone.layers[0].self_attn.v_proj.weight
    same = [
        torch.equal(now[copy], before["model.backbone.layers.0.self_attn.v_proj.weight"][copy]) for copy in range(5)
    ]
    assert same == [True, False, False, True, True]


SETS = StaticRouter.Config(experts_of_keys=((0, 1), 2, (0, 3)), combine="sum")


@pytest.mark.parametrize("router", [SETS, SoftRouter.Config(experts=(2, 1, 1), num_slots=2)], ids=["sets", "soft"])
@pytest.mark.parametrize("site", ["attention", "experts"])
def test_a_new_key_starts_as_the_experts_of_its_origin(site, router):
    attention = RoutedAttention.Config(num_heads=4, num_kv_heads=2, num_experts=4, router=router)
    seed = build(DENSE.replace(**{site: attention if site == "attention" else routed(4, router)}))
    added = {"modalities": {"depth": 4}, "start_from": {"depth": "image"}}
    grown, report = upcycle(seed, **added, batch=ids_like(DENSE), return_report=True)
    assert {change.function for change in report.changes} == {"exact"}
    assert report.measured.difference < 2e-6
    layer = grown.model.backbone.layers[0]
    part, old = (layer.self_attn, "q_proj") if site == "attention" else (layer.mlp.experts, "gate_up_proj")
    if isinstance(router, SoftRouter.Config):
        bank = getattr(part, old)
        bank = bank.weight if site == "attention" else bank
        assert len(bank) == 5
        assert torch.equal(bank[4], bank[2])  # the image's
        assert not torch.equal(bank[0], bank[1])


def test_towers_become_soft_experts_of_each_key():
    seed = build(MOT)
    router = SoftRouter.Config(experts=(2, 2, 2))
    attention = RoutedAttention.Config(num_heads=4, num_kv_heads=2, num_experts=6, router=router)
    layers = (LayerRange(attention=attention, experts=routed(6, router)),)
    model, report = upcycle(seed, layers=layers, return_report=True)
    assert {change.function for change in report.changes} == {"changed"}
    towers, bank = (part.model.backbone.layers[0].self_attn.q_proj.weight for part in (seed, model))
    assert torch.equal(bank, towers[[0, 0, 1, 1, 2, 2]])


def test_a_model_of_some_towers_keeps_their_experts(tmp_path):
    config = DECLARATIONS["attention_experts"]
    model = build(config)
    model.save_pretrained(tmp_path)
    alone = omnimoe.from_pretrained(tmp_path, towers=["text", "speech"])
    own = alone.model.backbone.layers[0].self_attn
    assert own.num_experts == 3
    held = model.model.backbone.layers[0].self_attn.q_proj.weight
    assert torch.equal(own.q_proj.weight, held[[0, 1, 5]])


def test_a_training_run_of_mixture_of_attention_heads_learns():
    attention = RoutedAttention.Config(num_heads=1, num_kv_heads=1, head_dim=16, num_experts=6, **HEADS)
    model = started(tiny().replace(attention=attention))
    run = Training(model, settings(steps=40, learning_rate=3e-3), corpus=Corpus.load("p"), show_progress=False)
    history = run.run()
    assert history.held_out["all"][-1] < history.held_out["all"][0] - 0.4
