"""What is frozen stays to the bit under every optimizer, and the rest learns."""

from __future__ import annotations

import pytest
import torch

from omnimoe import freeze, keep_frozen, load, unfreeze
from omnimoe.config import ConfigError
from omnimoe.freeze import frozen_rows
from omnimoe.layers import Attention
from omnimoe.routers import ByModalityRouter, ExpertChoiceRouter, TopKRouter
from omnimoe.train import TrainSettings, make_optimizer
from tests.declarations import DECLARATIONS, DENSE, MOT, PATCHES, TEXT, build, ids_like, routed, with_towers

MODELS = {
    **{name: DECLARATIONS[name] for name in ("mot", "mot_post", "merged", "moma", "transfusion")},
    "tied": MOT.replace(tie_word_embeddings=True),
    "choice": MOT.replace(
        experts=routed(6, ByModalityRouter.Config(experts=(2, 2, 2), router=ExpertChoiceRouter.Config()))
    ),
    "biased": MOT.replace(
        experts=routed(
            6, ByModalityRouter.Config(experts=(2, 2, 2), router=TopKRouter.Config(expert_bias="shared", top_k=1))
        )
    ),
}
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.5),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.5),
}


def steps(model, optimizer, count: int = 3) -> None:
    model.train()
    for seed in range(count):
        ids = ids_like(model.config, seed=seed)
        out = model(ids, labels=ids, **features(model.config))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_routers(out.routings)
    model.eval()


def features(config) -> dict:
    return {} if "latent" not in config.modality_names else {"features": {"latent": torch.zeros(0, 6)}}


def text_ids(config) -> torch.Tensor:
    return torch.randint(8, config.token_ranges["text"].stop, (2, 7))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_what_the_model_gives_for_frozen_modalities_stays_to_the_bit(name, kind):
    model = build(MODELS[name])
    frozen = freeze(model, ["text"])
    assert frozen.kept + frozen.trained == sum(weight.numel() for weight in model.parameters())
    assert frozen.kept > 0 < frozen.trained
    before, ids = {name: held.clone() for name, held in model.state_dict().items()}, text_ids(model.config)
    own = torch.arange(8, model.config.token_ranges["text"].stop)
    with torch.no_grad():
        wanted = model(ids, use_cache=True).logits[..., own]
    steps(model, keep_frozen(OPTIMIZERS[kind](model.parameters())))
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=True).logits[..., own], wanted)
    changed = [name for name, held in model.state_dict().items() if not torch.equal(held, before[name])]
    assert changed
    parameters = dict(model.named_parameters())
    for name in parameters:
        rows = frozen_rows(parameters[name])
        if rows is not None:
            assert torch.equal(parameters[name][rows], before[name][rows])
        elif not parameters[name].requires_grad:
            assert name not in changed
    assert frozen.partly == tuple(name for name in parameters if frozen_rows(parameters[name]) is not None)


def test_boundary_tokens_of_the_others_are_trained():
    model = build(MOT)
    freeze(model, ["text"])
    rows = set(frozen_rows(model.lm_head.weight).tolist())
    assert rows == set(range(20)) - {3, 4, 5, 6}


def test_gradients_reach_what_is_not_frozen_and_are_zero_elsewhere():
    model, ids = build(MOT), ids_like(MOT)
    freeze(model, ["text"])
    model(ids, labels=ids).loss.backward()
    weight = model.model.backbone.layers[0].self_attn.q_proj.weight
    assert weight.grad[0].abs().max() == 0
    assert all(weight.grad[copy].abs().max() > 0 for copy in (1, 2))


def test_without_the_guard_weight_decay_would_move_it():
    """The test above can fail."""
    model = build(MOT)
    freeze(model, ["text"])
    before = model.model.backbone.layers[0].self_attn.q_proj.weight[0].clone()
    steps(model, OPTIMIZERS["adamw"](model.parameters()), 1)
    assert not torch.equal(model.model.backbone.layers[0].self_attn.q_proj.weight[0], before)


def test_the_package_s_optimizer_keeps_it():
    model = build(MOT)
    freeze(model, ["text", "speech"])
    before = model.model.backbone.layers[0].mlp.experts.down_proj.detach().clone()
    steps(model, make_optimizer(model, TrainSettings(weight_decay=0.5, learning_rate=0.1)))
    after = model.model.backbone.layers[0].mlp.experts.down_proj
    assert [torch.equal(after[copy], before[copy]) for copy in range(3)] == [True, False, True]


def test_routers_that_adapt_outside_of_the_gradient_stop():
    model = build(MODELS["biased"])
    freeze(model, ["text"])
    steps(model, keep_frozen(torch.optim.SGD(model.parameters(), lr=0.1)))
    text, image, _ = model.model.backbone.layers[0].mlp.router.routers
    assert text.expert_bias.abs().max() == 0
    assert image.expert_bias.abs().max() > 0


def test_keys_of_roles_and_modalities_are_named_apart():
    roles = with_towers(DENSE, "modality", keys=("und", "gen"))
    model = build(roles)
    freeze(model, ["und"])
    assert frozen_rows(model.lm_head.weight) is None
    assert model.lm_head.weight.requires_grad
    assert frozen_rows(model.model.backbone.layers[0].self_attn.q_proj.weight).tolist() == [0]
    freeze(model, ["text"])
    assert len(frozen_rows(model.lm_head.weight)) == 16


def test_towers_of_different_widths():
    config = DENSE.replace(
        modalities=(TEXT, PATCHES),
        widths=(16, 8),
        attention=Attention.Config(num_heads=2, head_dim=8, towers="modality"),
        experts=DENSE.experts.replace(towers="modality"),
        norm=DENSE.norm.replace(towers="modality"),
        final_norm=DENSE.final_norm.replace(towers="modality"),
    )
    model = build(config)
    freeze(model, ["text"])
    projection = model.model.backbone.layers[0].self_attn.q_proj
    assert [copy.weight.requires_grad for copy in projection.copies] == [False, True]


def test_everything_trains_again():
    model = build(MODELS["biased"])
    freeze(model, ["text"])
    unfreeze(model)
    assert all(held.requires_grad and frozen_rows(held) is None for held in model.parameters())
    ids = ids_like(model.config)
    model(ids, labels=ids).loss.backward()
    assert model.model.backbone.layers[0].self_attn.q_proj.weight.grad[0].abs().max() > 0
    assert "update" not in vars(model.model.backbone.layers[0].mlp.router.routers[0])


def test_what_cannot_be_frozen_is_refused_and_nothing_changes():
    model = build(MOT)
    with pytest.raises(ConfigError, match="names out of text, image, speech, got 'words'"):
        freeze(model, ["words"])
    with pytest.raises(ConfigError, match="got \\(\\)"):
        freeze(model, [])
    with pytest.raises(ConfigError, match="nothing is left to train"):
        freeze(model, ["text", "image", "speech"])
    assert all(held.requires_grad and frozen_rows(held) is None for held in model.parameters())


def test_a_dense_model_keeps_its_layers_and_trains_new_rows():
    model = load("dense_nano", num_layers=1, seed=0)
    frozen = freeze(model, ["text"])
    assert frozen.partly == ("model.embed_tokens.weight",)
    assert frozen.trained == (2000 + 4) * model.config.hidden_size
