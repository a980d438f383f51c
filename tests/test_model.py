"""The model as a whole: gradients, saving and loading, recomputation, low precision, attention backends, outputs."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from omnimoe.modalities import Patches
from omnimoe.model import OmniMoeForCausalLM, OmniMoeModel
from omnimoe.routers import Router, Routing, register_router
from omnimoe.routers.base import ROUTERS
from tests.declarations import DECLARATIONS, DENSE, MOT, PATCHES, TEXT, build, ids_like, routed, with_towers
from tests.refusals import unchanged

NAMES = list(DECLARATIONS)
MULTI = [name for name, config in DECLARATIONS.items() if len(config.modalities) == 3]


def gradients(model, **given) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model(**given).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("present", ["all", "text alone"])
def test_every_parameter_gets_a_finite_gradient_even_of_absent_modalities(name, present):
    config = DECLARATIONS[name]
    ids = ids_like(config) if present == "all" else torch.randint(8, 20, (2, 7))
    found = gradients(build(config), input_ids=ids, labels=ids)
    assert not [key for key, grad in found.items() if grad is None]
    assert all(grad.isfinite().all() for grad in found.values())


@pytest.mark.parametrize("name", ["mot", "mot_post", "chameleon", "static", "moma", "moma_top_k"])
def test_towers_of_absent_modalities_get_exactly_zero(name):
    config = DECLARATIONS[name]
    ids = torch.randint(8, 20, (2, 7))
    found = gradients(build(config), input_ids=ids, labels=ids)
    seen = 0
    for key, grad in found.items():
        if "experts." in key and name.startswith("moma"):
            held, absent = grad[:2], grad[2:]
        elif "routers." in key:
            held, absent = (grad, grad[:0]) if ".routers.0." in key else (None, grad)
        elif grad.ndim >= 2 and grad.shape[0] == 3 and "backbone" in key:
            held, absent = grad[:1], grad[1:]
        else:
            continue
        seen += 1
        assert not absent.any(), key
        assert held is None or held.any(), key
    assert seen > 3


def test_text_before_the_picture_leaves_the_picture_tower_without_gradient():
    """A text loss with all text before the image: the image tower's gradient is exactly zero."""
    for config in (MOT, DECLARATIONS["mot_post"]):
        model = build(config)
        ids = torch.tensor([[8, 9, 10, 11, 20, 21, 22]])
        labels = torch.where(ids < 20, ids, -100)
        for key, grad in gradients(model, input_ids=ids, labels=labels).items():
            if grad.ndim >= 2 and grad.shape[0] == 3 and "lm_head" not in key and "embed" not in key:
                assert not grad[1:].any(), key
                assert grad[0].any(), key


def test_text_after_the_picture_trains_its_keys_and_values_alone_in_the_last_layer_and_all_of_it_before():
    attention = MOT.attention.replace(qk_norm="rms", bias=True)
    model = build(MOT.replace(num_layers=3, attention=attention))
    ids = torch.tensor([[20, 21, 22, 8, 9, 10, 11]])
    labels = torch.where(ids < 20, ids, -100)
    labels[0, 3] = -100  # the first text token is predicted by a row of the picture
    found = gradients(model, input_ids=ids, labels=labels)
    for layer in range(3):
        trained = {
            key.removeprefix(f"model.backbone.layers.{layer}.")
            for key, grad in found.items()
            if f".layers.{layer}." in key and grad[1].any()
        }
        everything = {
            key.removeprefix(f"model.backbone.layers.{layer}.") for key in found if f".layers.{layer}." in key
        }
        last = {
            "self_attn.k_proj.weight",
            "self_attn.k_proj.bias",
            "self_attn.v_proj.weight",
            "self_attn.v_proj.bias",
            "self_attn.k_norm.weight",
            "attention_norm.weight",
        }
        assert trained == (last if layer == 2 else everything)
    assert not found["model.norm.weight"][1].any()


@pytest.mark.parametrize("scored", ["labels", "targets"])
def test_a_head_that_is_not_scored_gets_a_zero_gradient(scored):
    model = build(DECLARATIONS["transfusion"])
    ids, rows = torch.tensor([[10, 3, 7, 7, 4, 12]]), torch.randn(2, 6)
    given = {"labels": ids} if scored == "labels" else {"targets": {"latent": rows}}
    found = gradients(model, input_ids=ids, features={"latent": rows}, **given)
    assert not [key for key, grad in found.items() if grad is None]
    head, other = found["lm_head.weight"], found["model.modalities.latent.out_proj"]
    assert head.any() == (scored == "labels")
    assert other.any() == (scored == "targets")


@pytest.mark.hazard(23)
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_step_without_any_label_is_zero_however_the_trainer_counts(name):
    model, ids = build(DECLARATIONS[name]), ids_like(DECLARATIONS[name])
    with unchanged(model.state_dict()):
        loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=torch.tensor(0)).loss
        loss.backward()
    assert loss == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_the_trainer_weighs_micro_batches_by_tokens_where_tokens_are_all_that_is_scored():
    assert build(DECLARATIONS["moe"]).accepts_loss_kwargs
    # a micro-batch of latents alone has no tokens, and would count for nothing
    assert not build(DECLARATIONS["transfusion"]).accepts_loss_kwargs


@pytest.mark.hazard(23)
@pytest.mark.parametrize("name", ["dense", "mot", "moe", "moma"])
def test_when_every_label_is_ignored_the_loss_is_the_balance_loss_alone_with_a_graph(name):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config)
    with unchanged(model.state_dict()):
        out = model(ids, labels=torch.full_like(ids, -100))
        out.loss.backward()
    assert torch.equal(out.loss, out.aux_loss if out.aux_loss is not None else torch.zeros(()))
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(count == 0 for count in out.counts.values())
    assert all(loss == 0 for loss in out.losses.values())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_recomputing_activations_changes_neither_loss_nor_gradients(name, use_reentrant):
    config = DECLARATIONS[name]
    model, ids = build(config).train(), ids_like(config)
    wanted_loss = model(ids, labels=ids).loss
    wanted = gradients(model, input_ids=ids, labels=ids)
    outside, inside = [], []
    layer = model.model.backbone.layers[0]
    layer.register_forward_pre_hook(lambda *_: outside.append(1))
    layer.self_attn.register_forward_pre_hook(lambda *_: inside.append(1))
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients(model, input_ids=ids, labels=ids)
    # once forward, once more in backward, where hooks of a layer, such as those of FSDP, must not run again
    assert (len(outside), len(inside)) == (1, 2)
    torch.testing.assert_close(model(ids, labels=ids).loss, wanted_loss)
    for key, grad in wanted.items():
        torch.testing.assert_close(found[key], grad, msg=lambda m, key=key: f"{key}: {m}")
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize("name", ["moe", "moma_top_k"])
def test_the_balance_loss_alone_trains_the_router(name):
    config = DECLARATIONS[name]
    model, ids = build(config).train(), ids_like(config)
    for use_reentrant in (None, False, True):
        if use_reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        model(ids).aux_loss.backward()
        assert all(p.grad.any() for n, p in model.named_parameters() if "scorer" in n and ".routers.2." not in n)


# -- saving and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("loader", [OmniMoeForCausalLM, AutoModelForCausalLM])
def test_saving_and_loading_restores_every_bit(name, loader, tmp_path):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config)
    for key, buffer in model.named_buffers():
        buffer.uniform_(0.2, 0.4)
        assert key.endswith(("cutoff", "expert_bias"))
    model.save_pretrained(tmp_path)
    again, info = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(again) is OmniMoeForCausalLM
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    # weights mapped from a file may be aligned otherwise, which moves the last bit of a product
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=2e-6, rtol=0)
    assert again.config.to_dict().keys() == config.to_dict().keys()
    assert again.config.blocks == config.blocks
    assert again.config.modalities == config.modalities


def test_loading_in_bfloat16_keeps_the_running_cutoffs_in_float32(tmp_path):
    model = build(DECLARATIONS["moma"])
    for _, buffer in model.named_buffers():
        buffer.uniform_(0.2, 0.4)
    model.save_pretrained(tmp_path)
    again = OmniMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, buffer in again.named_buffers():
        assert torch.equal(buffer, model.get_buffer(key)), key


def test_tied_embeddings_are_one_tensor_before_and_after_loading(tmp_path):
    model = build(DECLARATIONS["dense_tied"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = OmniMoeForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    untied = build(DENSE)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_the_auto_classes_know_the_model():
    assert type(AutoModel.from_config(MOT)) is OmniMoeModel
    assert type(AutoModelForCausalLM.from_config(MOT)) is OmniMoeForCausalLM
    assert type(AutoConfig.for_model("omnimoe")) is type(MOT)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_loaded_from_a_checkpoint_without_them_initialises_every_missing_parameter(name, tmp_path):
    """What a checkpoint lacks is made on loading, from memory that a fixture fills with NaN."""
    config = DECLARATIONS[name]
    source = OmniMoeForCausalLM(config)
    empty = {"model.embed_tokens.weight": source.model.embed_tokens.weight.detach().clone()}
    source.save_pretrained(tmp_path, state_dict=empty)
    again, info = OmniMoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) > 5
    fresh = {**dict(again.named_parameters()), **dict(again.named_buffers())}
    for key, value in {**dict(source.named_parameters()), **dict(source.named_buffers())}.items():
        got = fresh[key]
        assert got.isfinite().all(), key
        if value.unique().numel() == 1:
            assert torch.equal(got, value), key
        else:
            torch.testing.assert_close(
                got.std(), torch.tensor(0.2), atol=0.08, rtol=0, msg=lambda m, key=key: f"{key}: {m}"
            )


@pytest.mark.parametrize("name", NAMES)
def test_new_weights_have_the_configs_spread_and_norms_start_at_one(name):
    model = OmniMoeForCausalLM(DECLARATIONS[name])
    for key, parameter in model.named_parameters():
        if "norm" in key and key.endswith("weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), key
        elif key.endswith(("bias", "out_proj")):
            assert not parameter.any(), key
        else:
            assert 0.12 < parameter.std() < 0.28, key


def test_a_model_is_built_without_memory():
    with torch.device("meta"):
        model = OmniMoeForCausalLM(DECLARATIONS["moma"])
    assert all(parameter.is_meta for parameter in model.parameters())


# -- precision and backends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_autocast_to_bfloat16_runs_forward_and_backward_and_stays_close(name):
    config = DECLARATIONS[name].replace(initializer_range=0.05)
    model, ids = build(config), ids_like(config)
    wanted = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), wanted, atol=0.05, rtol=0.02)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_bfloat16_model_runs_forward_and_backward(name):
    config = DECLARATIONS[name].replace(initializer_range=0.05)
    model, ids = build(config), ids_like(config)
    wanted = model(ids, labels=ids).loss
    model = model.to(torch.bfloat16)
    loss = model(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), wanted, atol=0.1, rtol=0.02)
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "transfusion"])
@pytest.mark.parametrize("padded", [False, True])
def test_eager_attention_equals_the_fused_one_and_gives_its_weights(name, padded):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3], mask[1, 8:] = 0, 0
    wanted = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    out = model(ids, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(out.logits, wanted, atol=1e-5, rtol=1e-4)
    assert len(out.attentions) == config.num_layers
    for weights in out.attentions:
        assert weights.shape == (2, 4, 12, 12)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))
        if padded:
            assert not weights[0, :, 3:, :3].any()


def test_a_backend_that_is_missing_raises_and_names_the_remedy():
    from omnimoe.attend import attention_function

    with pytest.raises(ValueError, match="no attention implementation 'no_such'; take 'sdpa'"):
        attention_function("no_such", lambda name, default: default)


def test_a_third_partys_attention_is_called_with_an_additive_mask():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from omnimoe.attend import attention_function

    ALL_ATTENTION_FUNCTIONS.register("theirs", sdpa_attention_forward)
    try:
        model, ids = build(MOT), ids_like(MOT)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        wanted = model(ids, attention_mask=mask).logits
        model.config._attn_implementation = "theirs"
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(ids[:, :1]).logits, build(MOT)(ids[:, :1]).logits, atol=1e-5, rtol=1e-4)
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("theirs", None)
    assert attention_function("sdpa", None) is not None


# -- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "mot"])
def test_hidden_states_enter_each_layer_and_end_with_the_normed_ones(name):
    model, ids = build(DECLARATIONS[name]), ids_like(DENSE)
    out = model(ids, output_hidden_states=True)
    assert [tuple(part.shape) for part in out.hidden_states] == [(2, 12, 16)] * 3
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)


def test_logits_to_keep_gives_the_last_ones_or_those_asked_for():
    model, ids = build(MOT), ids_like(MOT)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])
    with torch.no_grad():
        assert model(ids, logits_to_keep=torch.arange(0)).logits.shape == (len(ids), 0, whole.shape[2])


def test_padding_comes_out_as_zeros():
    model, ids = build(MOT), ids_like(MOT)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    out = model.model(ids, attention_mask=mask)
    assert not out.last_hidden_state[0, :3].any()
    assert out.last_hidden_state[0, 3:].any(-1).all()


@pytest.mark.parametrize("name", ["moe", "moma", "moma_top_k", "mot_hybrid"])
def test_router_logits_come_in_order_of_time(name):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config)
    out = model(ids, output_router_logits=True)
    routed_layers = [block.experts for block in config.blocks if hasattr(block.experts, "router")]
    assert len(out.router_logits) == len(routed_layers)
    first = next(i for i, block in enumerate(config.blocks) if hasattr(block.experts, "router"))
    seen = []
    model.model.backbone.layers[first].mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    rows = model(ids).rows
    hidden = rows.to_time(seen[0]).reshape(24, -1)
    router = model.model.backbone.layers[first].mlp.router
    logits = out.router_logits[0]
    assert logits.shape == (24, model.model.backbone.layers[first].mlp.num_experts)
    if name in ("moe", "mot_hybrid"):
        torch.testing.assert_close(logits, hidden @ router.scorer.weight.T)
    else:
        kinds = model.model.modality_ids_of(ids).reshape(24)
        torch.testing.assert_close(logits[kinds == 1][:, 2:5], hidden[kinds == 1] @ router.routers[1].scorer.weight.T)
        assert (logits[kinds == 1][:, :2] == float("-inf")).all()
    assert model(ids).router_logits is None


def test_updating_routers_moves_the_cutoffs_of_expert_choice_alone():
    config = DECLARATIONS["moma"]
    model, ids = build(config).train(), ids_like(config)
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    out = model(ids, labels=ids)
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, before[key])  # a forward stores nothing
    model.update_routers(out.routings)
    assert any(not torch.equal(buffer, before[key]) for key, buffer in model.named_buffers())
    cutoff = out.routings[0].cutoff[:2]
    found = model.model.backbone.layers[0].mlp.router.routers[0].cutoff
    torch.testing.assert_close(
        found, 0.99 * before["model.backbone.layers.0.mlp.router.routers.0.cutoff"] + 0.01 * cutoff
    )
    build(MOT).update_routers(build(MOT)(ids).routings)


def test_a_forward_is_deterministic_and_stores_nothing_on_the_model():
    for name in ("mot", "moma", "moe"):
        config = DECLARATIONS[name]
        model, ids = build(config).train(), ids_like(config)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        assert torch.equal(model(ids).logits, model(ids).logits)
        assert torch.equal(model.eval()(ids).logits, model.train()(ids).logits)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_embeddings_in_the_place_of_ids():
    model, ids = build(MOT), ids_like(MOT)
    found = model(inputs_embeds=model.model.embed_tokens(ids), modality_ids=model.model.modality_ids_of(ids)).logits
    assert torch.equal(found, model(ids).logits)


def test_positions_that_are_given_are_used():
    model, ids = build(MOT), ids_like(MOT)
    ordinary = torch.arange(12).expand(2, -1)
    wanted = model(ids).logits
    torch.testing.assert_close(model(ids, position_ids=ordinary).logits, wanted)
    torch.testing.assert_close(model(ids, position_ids=ordinary[:1]).logits, wanted)
    # rotary positions are relative
    torch.testing.assert_close(model(ids, position_ids=ordinary + 5).logits, wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(ids, position_ids=2 * ordinary).logits, wanted, atol=1e-3)


def test_resizing_the_vocabulary_keeps_the_partition():
    model, ids = build(MOT), ids_like(MOT)
    wanted = model(ids).logits
    model.resize_token_embeddings(48)
    assert model.config.vocab_size == 48
    out = model(ids).logits
    assert out.shape[-1] == 48
    torch.testing.assert_close(out[..., :40], wanted)
    assert model.model.modality_ids_of(torch.tensor([[47]])).item() == 0


def test_a_router_of_ones_own_needs_no_change_of_the_package():
    @register_router("round_robin_test")
    class RoundRobin(Router):
        def __init__(self, config, *, hidden_size, num_experts, num_modalities):
            super().__init__()
            self.num_experts = num_experts

        def forward(self, x, rows):
            token_index = torch.arange(len(x), device=x.device)
            return Routing(token_index, token_index % self.num_experts, x.new_ones(len(x)))

    try:
        config = DENSE.replace(experts=routed(4, RoundRobin.Config()))
        ids = ids_like(config)
        out = build(config)(ids, labels=ids, output_router_logits=True)
        out.loss.backward()
        assert out.router_logits == ()
        assert torch.bincount(out.routings[0].expert_ids).tolist() == [6] * 4
    finally:
        ROUTERS.remove("round_robin_test")


# -- continuous modalities --------------------------------------------------------------------------------------------


def mixed() -> tuple[OmniMoeForCausalLM, torch.Tensor]:
    return build(DECLARATIONS["transfusion"]), torch.tensor([[10, 3, 7, 7, 4, 12], [3, 7, 7, 7, 4, 11]])


def test_a_transfusion_step_trains_both_sides():
    model, ids = mixed()
    side: Patches = model.model.modalities["latent"]
    clean, noise, time = torch.randn(5, 6), torch.randn(5, 6), torch.rand(5)
    noisy, target = side.corrupt(clean, time, noise)
    given = {"features": {"latent": noisy}, "timesteps": {"latent": time}, "targets": {"latent": target}}
    labels = ids.masked_fill(ids == 7, -100)
    out = model(ids, labels=labels, **given)
    assert out.predictions["latent"].shape == (5, 6)
    torch.testing.assert_close(out.losses["latent"], (out.predictions["latent"] - target).square().mean())
    torch.testing.assert_close(out.loss, out.losses["text"] + 5 * out.losses["latent"])
    assert out.counts["latent"] == 5
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(ids, labels=labels, **given).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * out.loss


def test_rows_of_features_go_to_their_places_in_order_of_batch_and_time():
    model, ids = mixed()
    rows = torch.randn(5, 6)
    embeds = model.model.embed_tokens(ids).clone()
    embeds[ids == 7] = model.model.modalities["latent"].embed(rows)
    kinds = model.model.modality_ids_of(ids)
    assert torch.equal(kinds, (ids == 7).long())
    wanted = model(inputs_embeds=embeds, modality_ids=kinds).logits
    torch.testing.assert_close(model(ids, features={"latent": rows}).logits, wanted)


def test_predictions_come_in_the_order_of_the_features():
    model, ids = mixed()
    rows = torch.randn(5, 6)
    out = model(ids, features={"latent": rows}, output_hidden_states=True)
    hidden = out.hidden_states[-1][ids == 7]
    torch.testing.assert_close(out.predictions["latent"], model.model.modalities["latent"].head(hidden))


def test_features_keep_their_order_where_one_modality_has_several_keys():
    """Rows are sorted by key, so a modality with two keys lies in two places."""
    config = with_towers(DENSE.replace(modalities=(TEXT, PATCHES)), "modality", keys=("und", "gen"))
    model, ids = build(config), torch.tensor([[7, 10, 7, 7, 11, 7]])
    keys, rows = torch.tensor([[1, 0, 0, 1, 1, 0]]), torch.randn(4, 6)
    embeds = model.model.embed_tokens(ids).clone()
    embeds[ids == 7] = model.model.modalities["latent"].embed(rows)
    wanted = model(inputs_embeds=embeds, modality_ids=(ids == 7).long(), key_ids=keys, output_hidden_states=True)
    out = model(ids, features={"latent": rows}, key_ids=keys)
    torch.testing.assert_close(out.logits, wanted.logits)
    hidden = wanted.hidden_states[-1][ids == 7]
    torch.testing.assert_close(out.predictions["latent"], model.model.modalities["latent"].head(hidden))


def test_padding_among_continuous_rows_is_left_out():
    model, ids = mixed()
    mask = torch.ones_like(ids)
    mask[0, 2] = 0
    rows = torch.randn(4, 6)
    out = model(ids, attention_mask=mask, features={"latent": rows})
    assert out.predictions["latent"].shape == (4, 6)
    alone = model(ids[1:], features={"latent": rows[1:]})
    torch.testing.assert_close(out.logits[1:], alone.logits, atol=1e-5, rtol=1e-4)


def test_the_time_of_the_noise_changes_the_prediction():
    model, ids = mixed()
    rows = torch.randn(5, 6)
    early = model(ids, features={"latent": rows}, timesteps={"latent": torch.full((5,), 0.1)})
    late = model(ids, features={"latent": rows}, timesteps={"latent": torch.full((5,), 0.9)})
    clean = model(ids, features={"latent": rows})
    zero = model(ids, features={"latent": rows}, timesteps={"latent": torch.zeros(5)})
    assert not torch.allclose(early.predictions["latent"], late.predictions["latent"], atol=1e-3)
    assert torch.equal(clean.logits, zero.logits)


def test_experts_of_ones_own_say_what_a_step_adapts():
    model = build(DECLARATIONS["moma"])
    out, seen = model(ids_like(DENSE)), []
    for layer in model.model.backbone.layers:
        layer.mlp.update = seen.append  # in the place of the method that hands it to the router
    model.update_routers(out.routings)
    assert seen == list(out.routings)
