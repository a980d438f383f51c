"""What must be equal: the packed path and a loop over positions, towers and dense models, one model declared four ways,
and the models of transformers that are special cases of ours."""

from __future__ import annotations

import pytest
import torch

from omnimoe.backbone import LayerRange
from omnimoe.experts import FeedForward
from omnimoe.layers import Attention, Norm, Rope
from omnimoe.modalities import Tokens
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.routers import ByModalityRouter, TopKRouter
from tests.declarations import DECLARATIONS, DENSE, MOT, build, copy_weights, ids_like, routed, with_towers
from tests.naive import naive_logits


def spans_of(keys: torch.Tensor, wanted: int) -> torch.Tensor:
    """A number for each run of one key, position by position; -1 elsewhere."""
    numbers = torch.full_like(keys, -1)
    for batch in range(len(keys)):
        number = 0
        for t in range(keys.shape[1]):
            if keys[batch, t] == wanted:
                number += t == 0 or keys[batch, t - 1] != wanted
                numbers[batch, t] = number
    return numbers


LOOPS = ["dense", "mot", "mot_post", "merged", "chameleon", "one_way", "block_causal", "encoder"]


def padding(kind: str, batch_size: int, length: int) -> torch.Tensor:
    valid = torch.ones(batch_size, length, dtype=torch.bool)
    if kind == "right":
        valid[1, length - 4 :] = False
    elif kind == "left":
        valid[0, :3] = False
    elif kind == "ragged":
        valid[0, :2], valid[1, 3:] = False, False
    return valid


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("kind", ["none", "right", "left", "ragged"])
def test_the_packed_path_equals_a_loop_over_positions(name, kind):
    config = DECLARATIONS[name]
    model, ids = build(config).double(), ids_like(config, 2, 9)
    valid = padding(kind, 2, 9)
    keys = model.model.modality_ids_of(ids)
    with torch.no_grad():
        found = model(ids, attention_mask=None if kind == "none" else valid.long()).logits
        wanted = naive_logits(model, ids, keys, valid, spans_of(keys, 1))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mot", "merged", "chameleon"])
def test_explicit_modality_ids_with_an_empty_modality_equal_the_loop(name):
    config = DECLARATIONS[name]
    model, ids = build(config).double(), ids_like(config, 2, 9)
    keys = torch.tensor([[2, 0, 0, 2, 2, 0, 2, 0, 0], [0] * 9])
    with torch.no_grad():
        found = model(ids, modality_ids=keys).logits
        wanted = naive_logits(model, ids, keys, torch.ones(2, 9, dtype=torch.bool))
    assert found.isfinite().all()
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


def test_a_layer_range_changes_its_layers_alone():
    other = Attention.Config(
        num_heads=2, num_kv_heads=1, towers=(0, 0, 1), qk_norm="rms", rope=Rope.Config(theta=100.0)
    )
    config = MOT.replace(
        num_layers=4,
        layers=(
            LayerRange(start=1, stop=4, step=2, attention=other, norm_placement="post"),
            LayerRange(start=3, experts=FeedForward.Config(intermediate_size=10), norm=Norm.Config(eps=1e-2)),
        ),
    )
    model, ids = build(config).double(), ids_like(config, 2, 8)
    assert [block.norm_placement for block in config.blocks] == ["pre", "post", "pre", "post"]
    assert [block.attention.num_heads for block in config.blocks] == [4, 2, 4, 2]
    assert [block.experts.intermediate_size for block in config.blocks] == [24, 24, 24, 10]
    with torch.no_grad():
        wanted = naive_logits(model, ids, model.model.modality_ids_of(ids), torch.ones(2, 8, dtype=torch.bool))
        torch.testing.assert_close(model(ids).logits, wanted, atol=2e-5, rtol=1e-5)


def test_keys_of_a_role_pick_the_copies_instead_of_the_modality():
    config = with_towers(DENSE, "modality", keys=("und", "gen"))
    model, ids = build(config).double(), ids_like(config, 2, 9)
    keys = torch.randint(0, 2, (2, 9))
    with torch.no_grad():
        wanted = naive_logits(model, ids, keys, torch.ones(2, 9, dtype=torch.bool))
        torch.testing.assert_close(model(ids, key_ids=keys).logits, wanted, atol=2e-5, rtol=1e-5)


def widen(name: str, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Every copy of a bank takes the one copy of the source."""
    return value if value.shape == like.shape else value.expand_as(like).contiguous()


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("towers", ["modality", (0, 1, 0), (1, 0, 0), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("qk_norm", ["none", "rms", "layer"])
def test_equal_towers_equal_the_dense_model(placement, towers, qk_norm):
    attention = DENSE.attention.replace(qk_norm=qk_norm, bias=True, output_bias=True)
    dense = DENSE.replace(norm_placement=placement, attention=attention)
    source = build(dense)
    model = copy_weights(build(with_towers(dense, towers), seed=1), source, change=widen)
    ids, mask = ids_like(dense, 2, 12), padding("ragged", 2, 12).long()
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, attention_mask=mask).logits, source(ids, attention_mask=mask).logits, atol=1e-5, rtol=1e-5
        )


def test_a_tower_map_of_one_copy_is_the_dense_model():
    source = build(DENSE)
    model = copy_weights(build(with_towers(DENSE, (0, 0, 0)), seed=1), source)
    ids = ids_like(DENSE)
    # rows are sorted here and not there; the copy a row meets and the order of attention are the same
    torch.testing.assert_close(model(ids).logits, source(ids).logits, atol=1e-6, rtol=1e-6)
    single = MOT.replace(modalities=(Tokens.Config(name="text", vocab_size=40),))
    alone = copy_weights(build(single, seed=1), source)
    assert torch.equal(alone(ids).logits, source(ids).logits)


@pytest.mark.parametrize("name", ["mot", "mot_post", "chameleon"])
def test_towers_permuted_with_their_ids_change_nothing(name):
    config = DECLARATIONS[name]
    source, ids = build(config), ids_like(config)
    order = torch.tensor([2, 0, 1])
    towers_of = {
        key
        for key, value in source.state_dict().items()
        if value.ndim >= 2 and value.shape[0] == 3 and ("backbone" in key or key == "model.norm.weight")
    }
    assert len(towers_of) > 10
    model = build(config, seed=1)
    model.load_state_dict({k: v[order] if k in towers_of else v for k, v in source.state_dict().items()})
    modality_ids = source.model.modality_ids_of(ids)
    renamed = order.argsort()[modality_ids]
    wanted = source(ids, modality_ids=modality_ids).logits
    torch.testing.assert_close(model(ids, modality_ids=renamed).logits, wanted, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(model(ids, modality_ids=modality_ids).logits, wanted, atol=1e-3)


@pytest.mark.parametrize("name", ["mot", "mot_post", "chameleon"])
@pytest.mark.parametrize("modality", [0, 1, 2])
def test_one_modality_alone_is_that_tower_alone(name, modality):
    config = DECLARATIONS[name]
    source, ids = build(config), ids_like(config)
    tower = with_towers(config, "shared")

    def pick(key: str, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return value if value.shape == like.shape else value[modality : modality + 1]

    alone = copy_weights(build(tower, seed=1), source, change=pick)
    found = source(ids, modality_ids=torch.full_like(ids, modality)).logits
    torch.testing.assert_close(found, alone(ids).logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("towers", [(0, 1, 1), (0, 1, 0), (0, 0, 1)], ids=str)
def test_leaving_one_modality_out_merges_the_other_two(towers):
    """A map that merges two keys equals full towers whose two copies are the same."""
    merged = build(with_towers(DENSE, towers))

    def spread(key: str, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return value if value.shape == like.shape else value[list(towers)]

    full, ids = copy_weights(build(MOT, seed=1), merged, change=spread), ids_like(DENSE)
    torch.testing.assert_close(full(ids).logits, merged(ids).logits, atol=1e-6, rtol=1e-6)


def test_one_implementation_under_four_declarations():
    """Dense, equal towers, MoMa with one expert a modality, and a mixture of one expert are one function."""
    one = routed(1, TopKRouter.Config(top_k=1, load_balance_coef=0.0))
    declarations = {
        "mot": DENSE.replace(experts=DENSE.experts.replace(towers="modality")),
        "moma_1t1i1s": DENSE.replace(experts=routed(3, ByModalityRouter.Config(experts=(1, 1, 1)))),
        "moe_of_one": DENSE.replace(experts=one),
    }
    source, ids = build(DENSE), ids_like(DENSE)
    reference = source(ids, labels=ids)
    reference.loss.backward()
    wanted = source.model.backbone.layers[0].mlp.experts.gate_up_proj.grad.sum(0)
    for name, config in declarations.items():
        model = build(config, seed=1)
        state = {
            key: widen(key, source.state_dict()[key], like) if key in source.state_dict() else like
            for key, like in model.state_dict().items()
        }
        model.load_state_dict(state)
        out = model(ids, labels=ids)
        out.loss.backward()
        torch.testing.assert_close(
            out.logits, reference.logits, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        grad = model.model.backbone.layers[0].mlp.experts.gate_up_proj.grad.sum(0)
        torch.testing.assert_close(grad, wanted, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "name", ["dense", "mot", "mot_post", "moe", "moma_top_k", "one_way", "block_causal", "encoder"]
)
def test_a_packed_row_equals_its_documents(name):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config, 1, 14)
    segments = torch.tensor([[0] * 5 + [1] * 6 + [-1] * 3])
    packed = model(ids, segment_ids=segments, labels=ids)
    parts = [model(ids[:, :5]).logits, model(ids[:, 5:11]).logits]
    torch.testing.assert_close(packed.logits[:, :11], torch.cat(parts, 1), atol=1e-5, rtol=1e-5)
    assert torch.equal(
        packed.token_losses[0] != 0, torch.tensor([False] + [True] * 4 + [False] + [True] * 5 + [False] * 3)
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for name in DECLARATIONS if name != "transfusion"])
def test_padding_changes_neither_logits_nor_loss(name, side):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config, 1, 10)
    pad = torch.zeros(1, 4, dtype=torch.int64)
    wide = torch.cat((pad, ids) if side == "left" else (ids, pad), 1)
    mask = torch.cat((pad, torch.ones_like(ids)) if side == "left" else (torch.ones_like(ids), pad), 1)
    out, wanted = model(wide, attention_mask=mask, labels=wide), model(ids, labels=ids)
    kept = out.logits[:, 4:] if side == "left" else out.logits[:, :10]
    torch.testing.assert_close(kept, wanted.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, wanted.loss, atol=1e-5, rtol=1e-5)
    assert out.counts == wanted.counts


def test_the_loss_is_one_mean_over_tokens_and_the_parts_are_means_by_what_is_predicted():
    config = DENSE.replace(modalities=(*DENSE.modalities[:2], DENSE.modalities[2].replace(loss_weight=3.0)))
    model, ids = build(config), ids_like(config)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    out = model(ids, labels=labels)
    each = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    predicted = labels[:, 1:].flatten()
    kinds = {"text": (0, 20, 1.0), "image": (20, 32, 1.0), "speech": (32, 40, 3.0)}
    total = 0.0
    for name, (low, high, weight) in kinds.items():
        chosen = each[(predicted >= low) & (predicted < high)]
        assert out.counts[name] == len(chosen) > 0
        torch.testing.assert_close(out.losses[name], chosen.mean())
        total = total + weight * chosen.sum()
    torch.testing.assert_close(out.loss, total / (predicted >= 0).sum())


# -- models of transformers -------------------------------------------------------------------------------------------


def one_modality(**changes) -> OmniMoeConfig:
    return OmniMoeConfig(hidden_size=32, num_layers=2, modalities=(Tokens.Config(name="text", vocab_size=64),)).replace(
        **changes
    )


def load_decoder(model: OmniMoeForCausalLM, theirs, *, swin: bool = False) -> OmniMoeForCausalLM:
    """Copies a decoder of transformers into every copy of every bank."""
    source = theirs.state_dict()
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    state = {}
    for key, like in model.state_dict().items():
        if key in ("lm_head.weight", "model.embed_tokens.weight"):
            value = source[key]
        elif key == "model.norm.weight":
            value = source["model.norm.weight"][None]
        else:
            _, _, _, layer, part, *rest = key.split(".")
            root = f"model.layers.{layer}."
            if part in names:
                value = source[f"{root}{names[part]}.weight"][None]
            elif part == "self_attn":
                value = source[f"{root}self_attn.{'.'.join(rest)}"]
                value = value[None]
            elif rest[-1] == "gate_up_proj" and f"{root}mlp.gate_proj.weight" in source:
                value = torch.cat([source[f"{root}mlp.{side}_proj.weight"] for side in ("gate", "up")])[None]
            elif rest[-1] == "down_proj" and f"{root}mlp.down_proj.weight" in source:
                value = source[f"{root}mlp.down_proj.weight"][None]
            elif part == "mlp" and rest[0] == "router":
                value = source[f"{root}mlp.gate.weight"]
            else:
                value = source[f"{root}mlp.experts.{rest[-1]}"]
        state[key] = value.expand(like.shape).clone() if value.shape != like.shape else value
    model.load_state_dict(state)
    return model.eval()


def shake(theirs):
    """Random values everywhere, norms and biases too."""
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
            else:
                parameter.normal_(std=0.15)
    return theirs.eval()


def compare(ours, theirs, vocabulary: int = 64, hide: slice | None = None):
    ids = torch.randint(0, vocabulary, (2, 11))
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :3] = 0
    mask[1, 9:] = 0
    with torch.no_grad():
        for given in (None, mask):
            wanted = theirs(input_ids=ids, attention_mask=given).logits
            for modality_ids in (None, torch.randint(0, len(ours.config.modalities), (2, 11))):
                found = ours(ids, attention_mask=given, modality_ids=modality_ids).logits
                keep = torch.ones(2, 11, dtype=torch.bool) if given is None else given.bool()
                a, b = found[keep], wanted[keep]
                if hide is not None:
                    a, b = a[:, hide], b[:, hide]
                torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


TWO = (Tokens.Config(name="text", vocab_size=40), Tokens.Config(name="image", vocab_size=24))


@pytest.mark.parametrize("towers", ["shared", "modality"])
def test_qwen3_is_a_pre_norm_model_with_rms_query_and_key_norms(towers):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    theirs = shake(
        Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False,
            )
        )
    )  # fmt: skip
    attention = Attention.Config(
        num_heads=4,
        num_kv_heads=2,
        head_dim=12,
        qk_norm="rms",
        qk_norm_eps=1e-6,
        rope=Rope.Config(theta=theta_of(theirs)),
    )
    config = one_modality(
        modalities=TWO,
        attention=attention,
        experts=FeedForward.Config(intermediate_size=48),
        norm=Norm.Config(eps=1e-6),
        final_norm=Norm.Config(eps=1e-6),
    )
    compare(load_decoder(build(with_towers(config, towers)), theirs), theirs)


@pytest.mark.parametrize("towers", ["shared", "modality"])
def test_qwen2_is_a_pre_norm_model_with_biases_on_queries_keys_and_values(towers):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    theirs = shake(
        Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, rms_norm_eps=1e-6, tie_word_embeddings=False,
            )
        )
    )  # fmt: skip
    config = one_modality(
        modalities=TWO,
        attention=Attention.Config(num_heads=4, num_kv_heads=2, bias=True, rope=Rope.Config(theta=theta_of(theirs))),
        experts=FeedForward.Config(intermediate_size=48),
        norm=Norm.Config(eps=1e-6),
        final_norm=Norm.Config(eps=1e-6),
    )
    compare(load_decoder(build(with_towers(config, towers)), theirs), theirs)


def theta_of(theirs) -> float:
    parameters = getattr(theirs.config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta", getattr(theirs.config, "rope_theta", 10_000.0)))


@pytest.mark.parametrize("towers", ["shared", "modality"])
@pytest.mark.parametrize("swin", [True, False], ids=["post_norm", "pre_norm"])
def test_chameleon_is_the_post_or_pre_norm_model_with_layer_norms_on_queries_and_keys(towers, swin):
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    vocabulary = (
        {f"t{i}": i for i in range(60)} | {"<image>": 60} | {f"IMGIMGA{c}Z": 61 + i for i, c in enumerate("ABC")}
    )
    theirs = shake(
        ChameleonForConditionalGeneration(
            ChameleonConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, swin_norm=swin, vocabulary_map=vocabulary, tie_word_embeddings=False,
                vq_config={"base_channels": 32, "num_res_blocks": 1, "channel_multiplier": [1], "resolution": 8,
                           "attn_resolutions": [], "embed_dim": 8, "num_embeddings": 4, "latent_channels": 8},
            )
        )
    )  # fmt: skip
    eps = theirs.config.rms_norm_eps
    attention = Attention.Config(
        num_heads=4, num_kv_heads=2, qk_norm="layer", qk_norm_eps=1e-5, rope=Rope.Config(theta=theta_of(theirs))
    )
    config = one_modality(
        modalities=TWO,
        attention=attention,
        experts=FeedForward.Config(intermediate_size=48),
        norm=Norm.Config(eps=eps),
        final_norm=Norm.Config(eps=eps),
        norm_placement="post" if swin else "pre",
    )
    ours = load_decoder(build(with_towers(config, towers)), theirs)
    # their head refuses image tokens by setting those logits to the lowest number
    compare(ours, theirs, vocabulary=60, hide=slice(0, 60))


MIXTURES = {"mixtral": True, "olmoe": False, "qwen3_moe": True, "qwen3_moe_raw": False}


def mixture(name: str):
    import transformers as hf

    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    if name == "mixtral":
        config = hf.MixtralConfig(**common, intermediate_size=24, num_local_experts=4, sliding_window=None)
        return shake(hf.MixtralForCausalLM(config))
    if name == "olmoe":
        return shake(
            hf.OlmoeForCausalLM(hf.OlmoeConfig(**common, intermediate_size=24, num_experts=4, norm_topk_prob=False))
        )
    config = hf.Qwen3MoeConfig(
        **common, head_dim=8, moe_intermediate_size=24, intermediate_size=24, num_experts=4,
        norm_topk_prob=name == "qwen3_moe", decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    return shake(hf.Qwen3MoeForCausalLM(config))


@pytest.mark.parametrize("name", MIXTURES)
def test_the_mixtures_of_transformers_equal_our_routed_experts(name):
    """Layer by layer, on the same rows: routing, experts, weighted sum."""
    theirs = mixture(name)
    block = theirs.model.layers[0].mlp
    source = dict(block.state_dict().items())
    experts = routed(4, TopKRouter.Config(top_k=2, normalize=MIXTURES[name])).build(
        hidden_size=32, num_modalities=1, layer_idx=0
    )
    experts.router.scorer.weight.data = source["gate.weight"]
    experts.experts.gate_up_proj.data, experts.experts.down_proj.data = (
        source["experts.gate_up_proj"],
        source["experts.down_proj"],
    )
    from omnimoe.layers import RowLayout

    x = torch.randn(3, 7, 32)
    rows = RowLayout.build(torch.zeros(3, 7, dtype=torch.int64), num_keys=1)
    wanted = block(x)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    found, routing = experts(x.view(21, 32), rows)
    torch.testing.assert_close(found, wanted.view(21, 32), atol=1e-5, rtol=1e-4)
    sums = routing.expert_weights.view(21, 2).sum(1)
    assert torch.allclose(sums, torch.ones(21)) == MIXTURES[name]


def test_whole_qwen3_moe_model_and_its_balance_loss():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    theirs = mixture("qwen3_moe")
    eps = theirs.config.rms_norm_eps
    config = one_modality(
        attention=Attention.Config(
            num_heads=4, num_kv_heads=2, qk_norm="rms", qk_norm_eps=eps, rope=Rope.Config(theta=theta_of(theirs))
        ),
        experts=routed(4, TopKRouter.Config(top_k=2, load_balance_coef=1.0)),
        norm=Norm.Config(eps=eps),
        final_norm=Norm.Config(eps=eps),
    )
    ours = load_decoder(build(config), theirs)
    compare(ours, theirs)
    ids = torch.randint(0, 64, (2, 11))
    with torch.no_grad():
        out = ours(ids, output_router_logits=True)
        both = theirs(ids, output_router_logits=True)
    for mine, other in zip(out.router_logits, both.router_logits, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
    # theirs counts top_k choices a token without dividing by top_k
    for mine, routing in zip(out.router_logits, out.routings, strict=True):
        wanted = load_balancing_loss_func((mine,), 4, 2) / 2
        torch.testing.assert_close(routing.losses["load_balance"], wanted)
    torch.testing.assert_close(out.aux_loss, sum(r.losses["load_balance"] for r in out.routings) / 2)
