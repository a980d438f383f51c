"""Published routers as settings of ours: the same experts with the same weights as transformers' own classes.

Rows are small whole numbers where a bias meets ties, so that nothing hangs on the last bit.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    Llama4TextConfig,
    LongcatFlashConfig,
    MixtralConfig,
    NllbMoeConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter, DeepseekV4TopKRouter
from transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe import Ernie4_5_VLMoeTextConfig
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeMoeBlock,
    Ernie4_5_VLMoeMoeTopKRouter,
)
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from omnimoe.experts import RoutedExperts
from omnimoe.layers import RowLayout
from omnimoe.routers import ByModalityRouter, HashRouter, Router, TopKRouter, load_balance_loss

WIDTH, EXPERTS, ROWS = 16, 8, 40


def rows_of(batch: int = 1, length: int = ROWS, **fields) -> RowLayout:
    rows = RowLayout.build(torch.zeros(batch, length, dtype=torch.int64), num_keys=1)
    return RowLayout(**{**vars(rows), **fields})


def dense(
    token_index: Tensor, ids: Tensor, weights: Tensor, num_experts: int = EXPERTS, num_rows: int = ROWS
) -> Tensor:
    """``(N, E)``, the weight of each expert for each row."""
    table = torch.zeros(num_rows, num_experts)
    taken = ids >= 0
    return table.index_put((token_index[taken], ids[taken]), weights[taken].float(), accumulate=True)


def ours(config: Router.Config, weight: Tensor, x: Tensor, bias: Tensor | None = None, rows=None, **fields) -> Tensor:
    router = config.build(hidden_size=WIDTH, num_experts=EXPERTS, num_modalities=1, **fields).eval()
    router.scorer.weight.data.copy_(weight)
    if bias is not None:
        router.expert_bias.copy_(bias)
    routing = router(x, rows or rows_of())
    count = EXPERTS + len(fields.get("free_experts", ()))
    return dense(routing.token_index, routing.expert_ids, routing.expert_weights, count)


def theirs(ids: Tensor, weights: Tensor, num_experts: int = EXPERTS) -> Tensor:
    rows = torch.arange(ROWS).repeat_interleave(ids.shape[1])
    return dense(rows, ids.reshape(-1), weights.reshape(-1), num_experts)


def drawn(seed: int = 0, num_experts: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, the router's weight and a bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (ROWS, WIDTH), (num_experts, WIDTH), (num_experts,)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, weight, 0.2 * bias


SIZES = {"hidden_size": WIDTH, "num_experts_per_tok": 3}
TOP = {"top_k": 3}
PLAIN = {
    "mixtral": (MixtralTopKRouter, MixtralConfig(num_local_experts=EXPERTS, **SIZES), TopKRouter.Config(**TOP)),
    "olmoe": (
        OlmoeTopKRouter,
        OlmoeConfig(num_experts=EXPERTS, norm_topk_prob=False, **SIZES),
        TopKRouter.Config(normalize=False, **TOP),
    ),
    "qwen3_moe": (
        Qwen3MoeTopKRouter,
        Qwen3MoeConfig(num_experts=EXPERTS, norm_topk_prob=True, **SIZES),
        TopKRouter.Config(**TOP),
    ),
    "qwen3_moe, raw": (
        Qwen3MoeTopKRouter,
        Qwen3MoeConfig(num_experts=EXPERTS, norm_topk_prob=False, **SIZES),
        TopKRouter.Config(normalize=False, **TOP),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_softmax_before_the_choice(name):
    theirs_class, published, config = PLAIN[name]
    x, weight, _ = drawn()
    module = theirs_class(published)
    module.weight.data.copy_(weight)
    _, weights, ids = module(x)
    torch.testing.assert_close(ours(config, weight, x), theirs(ids, weights))


def test_softmax_after_the_choice_is_the_normalised_one_with_a_bias_on_logits():
    x, weight, bias = drawn()
    module = GptOssTopKRouter(GptOssConfig(num_local_experts=EXPERTS, **SIZES))
    module.weight.data.copy_(weight)
    module.bias.data.copy_(bias)
    router = TopKRouter.Config(logit_bias=True, **TOP).build(hidden_size=WIDTH, num_experts=EXPERTS, num_modalities=1)
    router.scorer.weight.data.copy_(weight)
    router.scorer.bias.data.copy_(bias)
    routing = router(x, rows_of())
    _, weights, ids = module(x)
    found = dense(routing.token_index, routing.expert_ids, routing.expert_weights)
    torch.testing.assert_close(found, theirs(ids, weights))


@pytest.mark.parametrize(("groups", "kept"), [(4, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("normalize", [True, False])
def test_deepseek_v3(groups, kept, normalize):
    x, weight, bias = drawn()
    published = DeepseekV3Config(
        num_local_experts=EXPERTS, n_group=groups, topk_group=kept, norm_topk_prob=normalize,
        routed_scaling_factor=2.5, **SIZES,
    )  # fmt: skip
    module = DeepseekV3TopkRouter(published)
    module.weight.data.copy_(weight)
    module.e_score_correction_bias.copy_(bias)
    _, weights, ids = module(x)
    config = TopKRouter.Config(
        score="sigmoid", normalize=normalize, num_groups=groups, num_groups_kept=kept, routed_scaling_factor=2.5,
        expert_bias="shared", **TOP,
    )  # fmt: skip
    torch.testing.assert_close(ours(config, weight, x, bias), theirs(ids, weights))


def test_deepseek_v2():
    x, weight, _ = drawn()
    published = DeepseekV2Config(
        num_local_experts=EXPERTS, n_routed_experts=EXPERTS, n_group=4, topk_group=2, routed_scaling_factor=16.0,
        topk_method="group_limited_greedy", num_attention_heads=4, **SIZES,
    )  # fmt: skip
    module = DeepseekV2TopkRouter(published)
    module.weight.data.copy_(weight)
    _, weights, ids = module(x)
    config = TopKRouter.Config(
        normalize=False, num_groups=4, num_groups_kept=2, group_score="best", routed_scaling_factor=16.0, **TOP
    )
    torch.testing.assert_close(ours(config, weight, x), theirs(ids, weights))


def test_deepseek_v4():
    x, weight, bias = drawn()
    published = DeepseekV4Config(num_local_experts=EXPERTS, routed_scaling_factor=1.5, vocab_size=50, **SIZES)
    module = DeepseekV4TopKRouter(published)
    module.weight.data.copy_(weight)
    module.e_score_correction_bias.copy_(bias)
    _, weights, ids = module(x)
    config = {"score": "sqrt_softplus", "routed_scaling_factor": 1.5, **TOP}
    learned = TopKRouter.Config(expert_bias="shared", **config)
    torch.testing.assert_close(ours(learned, weight, x, bias), theirs(ids, weights))


def test_deepseek_v4_hash_layers():
    x, weight, _ = drawn()
    published = DeepseekV4Config(num_local_experts=EXPERTS, routed_scaling_factor=1.5, vocab_size=50, **SIZES)
    module = DeepseekV4HashRouter(published)
    config = HashRouter.Config(num_ids=50, top_k=3, score="sqrt_softplus", routed_scaling_factor=1.5)
    router = config.build(hidden_size=WIDTH, num_experts=EXPERTS, num_modalities=1)
    router.scorer.weight.data.copy_(weight)
    module.weight.data.copy_(weight)
    module.tid2eid.copy_(router.table)
    token_ids = torch.randint(0, 50, (ROWS,))
    _, weights, ids = module(x, token_ids)
    routing = router(x, rows_of(token_ids=token_ids))
    found = dense(routing.token_index, routing.expert_ids, routing.expert_weights)
    torch.testing.assert_close(found, theirs(ids, weights))


def test_ernie_4_5_vl():
    x, weight, bias = drawn()
    published = Ernie4_5_VLMoeTextConfig(hidden_size=WIDTH, moe_num_experts=EXPERTS, moe_k=3)
    module = Ernie4_5_VLMoeMoeTopKRouter(published)
    module.weight.data.copy_(weight)
    module.moe_statics.e_score_correction_bias.data.copy_(0.1 * bias)
    _, weights, ids = module(x)
    config = TopKRouter.Config(expert_bias="shared", top_k=published.num_experts_per_tok)
    torch.testing.assert_close(ours(config, weight, x, 0.1 * bias), theirs(ids, weights))


def copied(layer: RoutedExperts, bank) -> None:
    """Takes over a bank of transformers, whose matrices may lie transposed."""
    for name in ("gate_up_proj", "down_proj"):
        mine, given = getattr(layer.experts, name), getattr(bank, name)[: layer.num_experts]
        mine.data.copy_(given if given.shape == mine.shape else given.transpose(1, 2))


def drawn_parameters(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3)


@pytest.mark.parametrize("mixed", [True, False], ids=["text and vision", "text alone"])
def test_ernie_4_5_vl_keeps_two_pools_and_shares_an_expert(mixed):
    published = Ernie4_5_VLMoeTextConfig(
        hidden_size=WIDTH, moe_num_experts=EXPERTS, moe_k=3, moe_intermediate_size=[24, 10], moe_num_shared_experts=2
    )
    module = Ernie4_5_VLMoeMoeBlock(published)
    drawn_parameters(module)
    inner = TopKRouter.Config(top_k=published.num_experts_per_tok, expert_bias="shared")
    config = RoutedExperts.Config(
        num_experts=2 * EXPERTS, intermediate_size=24, pools=((EXPERTS, 24), (EXPERTS, 10)), num_shared_experts=2,
        router=ByModalityRouter.Config(experts=(EXPERTS, EXPERTS), router=inner),
    )  # fmt: skip
    layer = config.build(hidden_size=WIDTH, num_modalities=2, layer_idx=0)
    for key, pool in enumerate((module.text_moe, module.vision_moe)):
        layer.experts.pools[key].gate_up_proj.data.copy_(pool.experts.gate_up_proj)
        layer.experts.pools[key].down_proj.data.copy_(pool.experts.down_proj)
        layer.router.routers[key].scorer.weight.data.copy_(pool.gate.weight)
        layer.router.routers[key].expert_bias.copy_(pool.gate.moe_statics.e_score_correction_bias[0])
    shared = module.shared_experts
    layer.shared_experts.gate_up_proj.data[0].copy_(torch.cat((shared.gate_proj.weight, shared.up_proj.weight)))
    layer.shared_experts.down_proj.data[0].copy_(shared.down_proj.weight)
    kinds = torch.randint(0, 2, (2, 20)) * mixed
    x = torch.randn(2, 20, WIDTH)
    rows = RowLayout.build(kinds, num_keys=2)
    found, _ = layer(rows.to_rows(x), rows)
    torch.testing.assert_close(rows.to_time(found), module(x, kinds)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
def test_llama4_scales_what_experts_get(top_k):
    published = Llama4TextConfig(
        hidden_size=WIDTH, intermediate_size=24, num_local_experts=EXPERTS, num_experts_per_tok=top_k
    )
    module = Llama4TextMoe(published)
    drawn_parameters(module)
    config = RoutedExperts.Config(
        num_experts=EXPERTS, intermediate_size=24, num_shared_experts=1, weights_on="input",
        router=TopKRouter.Config(top_k=top_k, score="sigmoid", normalize=False),
    )  # fmt: skip
    layer = config.build(hidden_size=WIDTH, num_modalities=1, layer_idx=0)
    copied(layer, module.experts)
    layer.router.scorer.weight.data.copy_(module.router.weight)
    shared = module.shared_expert
    layer.shared_experts.gate_up_proj.data[0].copy_(torch.cat((shared.gate_proj.weight, shared.up_proj.weight)))
    layer.shared_experts.down_proj.data[0].copy_(shared.down_proj.weight)
    x = torch.randn(ROWS, WIDTH)
    wanted, _ = module(x)
    found, _ = layer(x, rows_of())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    scaled = config.replace(weights_on="output").build(hidden_size=WIDTH, num_modalities=1, layer_idx=0)
    scaled.load_state_dict(layer.state_dict())
    assert not torch.allclose(scaled(x, rows_of())[0], wanted, atol=1e-3)


def test_longcat_flash_has_identity_experts():
    published = LongcatFlashConfig(
        hidden_size=WIDTH, n_routed_experts=EXPERTS, zero_expert_num=4, moe_topk=3, expert_ffn_hidden_size=24,
        routed_scaling_factor=6.0,
    )  # fmt: skip
    module = LongcatFlashMoE(published)
    drawn_parameters(module)
    x, _, bias = drawn(num_experts=EXPERTS + 4)
    module.router.e_score_correction_bias.copy_(0.3 * bias)
    router = TopKRouter.Config(top_k=3, normalize=False, routed_scaling_factor=6.0, expert_bias="shared")
    config = RoutedExperts.Config(num_experts=EXPERTS, intermediate_size=24, router=router, num_identity_experts=4)
    layer = config.build(hidden_size=WIDTH, num_modalities=1, layer_idx=0)
    copied(layer, module.experts)
    layer.router.scorer.weight.data.copy_(module.router.classifier.weight)
    layer.router.expert_bias.copy_(0.3 * bias)
    found, routing = layer(x, rows_of())
    assert (routing.expert_ids >= EXPERTS).any()
    torch.testing.assert_close(found, module(x[None])[0], atol=1e-5, rtol=1e-4)


def test_qwen2_moe_gates_its_shared_expert():
    published = Qwen2MoeConfig(
        num_experts=EXPERTS, moe_intermediate_size=24, shared_expert_intermediate_size=40, norm_topk_prob=False, **SIZES
    )
    module = Qwen2MoeSparseMoeBlock(published)
    drawn_parameters(module)
    config = RoutedExperts.Config(
        num_experts=EXPERTS, intermediate_size=24, num_shared_experts=1, shared_intermediate_size=40,
        shared_gate="sigmoid", router=TopKRouter.Config(normalize=False, **TOP),
    )  # fmt: skip
    layer = config.build(hidden_size=WIDTH, num_modalities=1, layer_idx=0)
    copied(layer, module.experts)
    layer.router.scorer.weight.data.copy_(module.gate.weight)
    layer.shared_gate.weight.data.copy_(module.shared_expert_gate.weight)
    shared = module.shared_expert
    layer.shared_experts.gate_up_proj.data[0].copy_(torch.cat((shared.gate_proj.weight, shared.up_proj.weight)))
    layer.shared_experts.down_proj.data[0].copy_(shared.down_proj.weight)
    x = torch.randn(ROWS, WIDTH)
    torch.testing.assert_close(layer(x, rows_of())[0], module(x[None])[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("capacity", [1, 2, 100])
def test_switch_counts_room_by_sequence(capacity):
    x, weight, _ = drawn()
    published = SwitchTransformersConfig(d_model=WIDTH, num_experts=EXPERTS, expert_capacity=capacity)
    module = SwitchTransformersTop1Router(published).eval()
    module.classifier.weight.data.copy_(weight)
    taken, probs, _ = module(x.view(4, 10, WIDTH))
    config = TopKRouter.Config(top_k=1, capacity=capacity, capacity_pool="sequence")
    found = ours(config, weight, x, rows=rows_of(4, 10))
    torch.testing.assert_close(found, (taken * probs).view(ROWS, EXPERTS))
    assert (found.sum(-1) == 0).any() == (capacity < 100)


@pytest.mark.parametrize("priority", ["position", "score"])
@pytest.mark.parametrize("before", [True, False])
def test_nllb_drops_second_choices_first(priority, before):
    x, weight, _ = drawn()
    published = NllbMoeConfig(
        d_model=WIDTH, num_experts=EXPERTS, expert_capacity=10, second_expert_policy="all",
        batch_prioritized_routing=priority == "score", normalize_router_prob_before_dropping=before,
    )  # fmt: skip
    module = NllbMoeTop2Router(published).train()
    module.classifier.weight.data.copy_(weight)
    _, gates = module.route_tokens(x @ weight.t())
    config = TopKRouter.Config(top_k=2, capacity_factor=1.0, capacity_priority=priority, normalize_kept=not before)
    found = ours(config, weight, x)
    torch.testing.assert_close(found, gates)
    assert (found > 0).sum() < 2 * ROWS


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_coefficient_of_transformers_means_the_same(top_k):
    x, weight, _ = drawn()
    logits = x @ weight.t()
    wanted = load_balancing_loss_func((logits,), EXPERTS, top_k)
    probs = logits.softmax(-1)
    ids = probs.topk(top_k).indices.flatten()
    found = load_balance_loss(probs, ids, top_k, form="choices_per_token")
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(load_balance_loss(probs, ids, top_k) * top_k, wanted)
