"""Mixture-of-Mamba: what its copies are, what they cost, and that a small one learns from real data."""

from __future__ import annotations

import pytest
import torch

from omnimoe import OmniMoeForCausalLM, active_params, denoise, flops, model_info, shrink, upcycle
from omnimoe.data import Corpus
from omnimoe.model import MODELS
from omnimoe.train import Training, TrainSettings
from omnimoe.zoo.mamba import mixture

SITES = ("in_proj", "x_proj", "dt_proj", "out_proj")
SIZES = ("37m", "94m", "443m", "880m", "1_5b")
SMALL = ("nano", "micro")


@pytest.mark.parametrize("size", [*SIZES, "443m_speech", "transfusion_163m", *SMALL])
def test_a_token_meets_the_weights_of_the_dense_twin(size):
    dense, untied = (MODELS.get(f"{family}_{size}")() for family in ("mamba", "mixture_of_mamba"))
    assert [active_params(untied, name) for name in untied.modality_names] == [
        active_params(dense, name) for name in dense.modality_names
    ]
    assert flops(untied).total == flops(dense).total
    width, copies = dense.hidden_size, len(dense.modalities)
    # in 4D^2, x 2D (D/16 + 32), dt D/16 2D and its bias 2D, out 2D^2, a layer
    split = 6 * width**2 + 2 * width * (width // 16 + 32) + width // 16 * 2 * width + 2 * width
    found = model_info(f"mixture_of_mamba_{size}").total_params - model_info(f"mamba_{size}").total_params
    assert found == (copies - 1) * dense.num_layers * split


@pytest.mark.parametrize("size", SIZES)
def test_counts_fit_the_labels(size):
    label = {"37m": 37, "94m": 94, "443m": 443, "880m": 880, "1_5b": 1500}[size]
    assert model_info(f"mamba_{size}").total_params / 1e6 == pytest.approx(label, rel=0.05)


@pytest.mark.parametrize(("size", "label"), [("nano", 3e6), ("micro", 10e6)])
def test_small_ones_are_as_large_as_their_kin(size, label):
    assert model_info(f"mamba_{size}").total_params == pytest.approx(label, rel=0.05)
    assert model_info(f"mamba_{size}").total_params == pytest.approx(model_info(f"dense_{size}").total_params, rel=0.02)
    assert model_info(f"mixture_of_mamba_{size}").is_causal


def test_what_is_shared_and_what_is_not():
    layer = OmniMoeForCausalLM(shrink(MODELS.get("mixture_of_mamba_nano")())).model.backbone.layers[0]
    assert [getattr(layer.self_attn, site).num_copies for site in SITES] == [3] * 4
    assert layer.self_attn.rates.A_log.shape == (128, 16)
    assert layer.attention_norm.num_copies == 1
    assert layer.mlp_norm is None
    assert not list(layer.mlp.parameters())


def test_every_ablation_of_the_paper_is_a_config():
    dense = MODELS.get("mamba_nano")()
    one = mixture(dense, x_proj="shared", out_proj=(0, 1, 1))
    layer = OmniMoeForCausalLM(shrink(one)).model.backbone.layers[0].self_attn
    assert [getattr(layer, site).num_copies for site in SITES] == [3, 1, 3, 2]
    assert mixture(one, "shared") == dense or mixture(one, "shared").to_dict() == dense.to_dict()


@pytest.mark.parametrize("pair", [("mixture_of_mamba_nano", "mamba_nano")])
def test_equal_copies_are_the_dense_twin(pair):
    untied, dense = (OmniMoeForCausalLM(shrink(MODELS.get(name)())).eval() for name in pair)
    held = dict(dense.named_parameters())
    ids = torch.randint(16, 96, (2, 20))
    with torch.no_grad():
        for name, parameter in untied.named_parameters():
            parameter.copy_(held[name].expand_as(parameter))
        torch.testing.assert_close(untied(ids).logits, dense(ids).logits, atol=1e-6, rtol=1e-6)


def test_it_learns_from_the_shipped_corpus():
    config = MODELS.get("mixture_of_mamba_nano")().replace(hidden_size=64, num_layers=2)
    torch.manual_seed(0)
    settings = TrainSettings(
        steps=30,
        batch_size=3,
        sequence_length=96,
        warmup=5,
        learning_rate=1e-2,
        precision="fp32",
        evaluate_every=30,
        evaluate_batches=2,
        log_every=30,
    )
    run = Training(OmniMoeForCausalLM(config), settings, corpus=Corpus.load("p"), show_progress=False)
    history = run.run()
    for name, (before, after) in history.held_out.items():
        assert after < before, name
    assert history.held_out["all"][1] < history.held_out["all"][0] - 0.5
    decays = next(set(map(id, group["params"])) for group in run.optimizer.param_groups if group["weight_decay"])
    mixer = run.model.model.backbone.layers[0].self_attn
    assert id(mixer.in_proj.weight) in decays
    assert not {id(held) for held in (mixer.rates.A_log, mixer.rates.D, mixer.dt_proj.bias)} & decays


def test_a_dense_seed_becomes_a_mixture():
    seed = OmniMoeForCausalLM(shrink(MODELS.get("mamba_nano")())).eval()
    ids = torch.randint(16, 96, (2, 12))
    mixed = upcycle(seed, towers={"attention": "modality"}).eval()
    with torch.no_grad():
        torch.testing.assert_close(mixed(ids).logits, seed(ids).logits, atol=1e-6, rtol=1e-6)
    assert mixed.model.backbone.layers[1].self_attn.x_proj.num_copies == 3


def test_pictures_are_drawn_from_a_kept_state():
    config = shrink(MODELS.get("mixture_of_mamba_transfusion_163m")())
    model = OmniMoeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    image = config.modalities[1]
    ids = torch.tensor([[1, 7, 8, 9, image.begin_id, *[image.placeholder_id] * 4, image.end_id]] * 2)
    kinds = torch.tensor([[0] * 5 + [1] * 4 + [0]] * 2)
    drawn = [denoise(model, "image", ids, modality_ids=kinds, steps=4, seed=0, use_cache=use) for use in (True, False)]
    assert (drawn[0] - drawn[1]).norm() < 1e-5 * drawn[1].norm()
    assert drawn[0].shape == (8, 32)
    changed = ids.clone()
    changed[:, 1] = 11
    again = denoise(model, "image", changed, modality_ids=kinds, steps=4, seed=0)
    assert (again - drawn[0]).norm() > 1e-3 * drawn[0].norm(), "what is drawn follows the words"
