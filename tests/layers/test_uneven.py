"""Towers that differ in width, against a walk over single rows; and equal widths, which change nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from omnimoe import (
    Attention,
    FeedForward,
    Norm,
    OmniMoeConfig,
    OmniMoeForCausalLM,
    RoutedExperts,
    Tokens,
    freeze,
    lora_targets,
    quantize,
    shrink,
)
from omnimoe.config import ConfigError
from omnimoe.flops import active_params, flops, formulas, total_params
from omnimoe.inputs import InputError
from omnimoe.layers import BankLinear, RowLayout
from omnimoe.layers.uneven import Uneven, UnevenMLP, build_norm, copy_widths, linear_bank, mlp_bank
from omnimoe.modalities import Patches, Trajectory
from omnimoe.towers import select

KEYS = torch.tensor([[2, 0, 1, 0, 2], [1, 1, 0, 2, 2]])
WIDTHS = (8, 4, 8)
TOWERS = [(0, 1, 0), (0, 1, 2), (1, 0, 1)]


def rows_of(keys: torch.Tensor = KEYS, valid: torch.Tensor | None = None) -> RowLayout:
    return RowLayout.build(keys, num_keys=3, valid=valid)


def narrowed(rows: RowLayout, width: int = 8) -> torch.Tensor:
    """Rows of the stream: zero where a row has no column."""
    x = torch.randn(len(rows), width, requires_grad=True)
    own = torch.tensor(WIDTHS)[rows.key_ids].unsqueeze(1)
    return torch.where(torch.arange(width) < own, x, 0)


@pytest.fixture(params=TOWERS, ids=str)
def towers(request) -> tuple[int, ...]:
    return request.param


def test_a_row_is_read_and_written_in_the_columns_of_its_copy(towers):
    rows = rows_of()
    widths = copy_widths("q_proj", towers, 8, WIDTHS)
    into, out = linear_bank(towers, widths, 6, bias=True), linear_bank(towers, 6, widths)
    assert isinstance(into, Uneven)
    x = narrowed(rows)
    middle = into(x, rows)
    y = out(middle, rows)
    assert middle.shape == (10, 6)
    assert y.shape == (10, 8)
    for row, key in enumerate(rows.key_ids.tolist()):
        first, second = into.copies[towers[key]], out.copies[towers[key]]
        own = F.linear(x[row, : WIDTHS[key]], first.weight[0], first.bias[0])
        torch.testing.assert_close(middle[row], own)
        torch.testing.assert_close(y[row, : WIDTHS[key]], F.linear(own, second.weight[0]))
        assert not y[row, WIDTHS[key] :].any()


def test_a_norm_is_over_the_columns_that_a_row_has(towers):
    rows = rows_of()
    norm = build_norm(Norm.Config(towers=towers, eps=1e-4, offset=1.0), hidden_size=8, num_modalities=3, widths=WIDTHS)
    for parameter in norm.parameters():
        parameter.data.normal_()
    x = narrowed(rows)
    y = norm(x, rows)
    for row, key in enumerate(rows.key_ids.tolist()):
        scale = 1 + norm.copies[towers[key]].weight[0]
        wanted = F.rms_norm(x[row, : WIDTHS[key]], (WIDTHS[key],), scale, 1e-4)
        torch.testing.assert_close(y[row, : WIDTHS[key]], wanted)
        assert not y[row, WIDTHS[key] :].any()


@pytest.mark.parametrize("gated", [True, False])
def test_networks_of_several_widths(towers, gated):
    rows, inner = rows_of(), tuple(range(5, 6 + max(towers)))
    bank = mlp_bank(towers, copy_widths("mlp", towers, 8, WIDTHS), inner, 8, activation="gelu_tanh", gated=gated)
    assert isinstance(bank, UnevenMLP)
    x = narrowed(rows)
    y = bank(x, rows)
    for row, key in enumerate(rows.key_ids.tolist()):
        copy, width = bank.copies[towers[key]], WIDTHS[key]
        into = F.linear(x[row, :width], copy.gate_up_proj[0])
        assert copy.down_proj.shape == (1, width, inner[towers[key]])
        worked = F.gelu(into, approximate="tanh")
        if gated:
            gate, up = into.chunk(2)
            worked = F.gelu(gate, approximate="tanh") * up
        torch.testing.assert_close(y[row, :width], F.linear(worked, copy.down_proj[0]))
        assert not y[row, width:].any()


def test_a_copy_without_rows_has_a_gradient_of_zero():
    rows = rows_of(torch.tensor([[0, 2, 2]]))
    bank = linear_bank((0, 1, 0), (8, 4), 6)
    bank(narrowed(rows), rows).square().sum().backward()
    first, second = bank.copies
    assert first.weight.grad.any()
    assert second.weight.grad is not None
    assert not second.weight.grad.any()


def test_no_rows_at_all():
    rows = rows_of(torch.tensor([[0, 1]]), valid=torch.zeros(1, 2, dtype=torch.bool))
    bank = linear_bank((0, 1, 0), (8, 4), 6)
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            assert bank(torch.zeros(0, 8), rows).shape == (0, 6)


def test_copies_of_one_width_are_a_plain_bank():
    assert isinstance(linear_bank((0, 1), 8, 6), BankLinear)
    assert copy_widths("q_proj", (0, 1, 0), 8, (8, 8, 8)) == 8
    assert copy_widths("q_proj", (0, 1, 0), 8, ()) == 8
    with pytest.raises(ConfigError, match=r"widths 4 and 8 share a copy of k_proj"):
        copy_widths("k_proj", (0, 0, 0), 8, WIDTHS)


def declared(**changes) -> OmniMoeConfig:
    """Words, actions of half their width, latents of their width."""
    towers = (0, 1, 2)
    norm = Norm.Config(towers=towers)
    fields = {
        "hidden_size": 32,
        "widths": (32, 16, 32),
        "num_layers": 2,
        "modalities": (
            Tokens.Config(name="text", vocab_size=64),
            Trajectory.Config(name="action", channels=5, placeholder_id=60),
            Patches.Config(name="latent", channels=6, placeholder_id=61),
        ),
        "attention": Attention.Config(
            num_heads=4, num_kv_heads=2, head_dim=8, bias=True, output_bias=True, towers=towers
        ),
        "experts": FeedForward.Config(intermediate_sizes=(48, 24, 40), towers=towers),
        "norm": norm,
        "final_norm": norm,
    }
    return OmniMoeConfig(**{**fields, **changes})


def batch() -> dict:
    ids = torch.tensor([[1, 2, 60, 60, 3, 61, 61], [4, 60, 60, 60, 60, 5, 0]])
    features = {"action": torch.randn(6, 5), "latent": torch.randn(2, 6)}
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "features": features,
        "timesteps": {name: torch.rand(len(rows)) for name, rows in features.items()},
        "targets": {name: torch.randn_like(rows) for name, rows in features.items()},
        "labels": ids,
    }


def test_equal_widths_change_no_bit():
    uneven = {"widths": (), "experts": FeedForward.Config(intermediate_size=48, towers=(0, 1, 2))}
    torch.manual_seed(0)
    plain = OmniMoeForCausalLM(declared(**uneven))
    torch.manual_seed(0)
    same = OmniMoeForCausalLM(
        declared(
            **{**uneven, "widths": (32, 32, 32), "experts": FeedForward.Config(intermediate_size=48, towers=(0, 1, 2))}
        )
    )
    given = batch()
    assert plain.state_dict().keys() == same.state_dict().keys()
    assert torch.equal(plain(**given).loss, same(**given).loss)


def test_counts_agree_with_the_model_and_with_what_it_computes():
    config = declared()
    model = OmniMoeForCausalLM(config)
    assert total_params(config) == sum(parameter.numel() for parameter in model.parameters())
    assert active_params(config, "action") < active_params(config, "text")
    given = batch()
    del given["attention_mask"]
    with FlopCounterMode(display=False, custom_mapping=formulas()) as counter, torch.no_grad():
        model(**given)
    # beside what is counted: the network of the time, over the row and the code
    assert counter.get_total_flops() == flops(model, given).total


def test_a_traced_step_is_one_graph_and_the_same():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, given = OmniMoeForCausalLM(declared()).train(), batch()
    wanted = model(**given)
    found = torch.compile(model, fullgraph=True, backend="eager")(**given)
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(found.predictions["action"], wanted.predictions["action"])
    wanted.loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    found.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], atol=1e-5, rtol=1e-3, msg=name)


def test_recomputed_layers_give_the_same_gradients():
    torch.manual_seed(0)
    model, given = OmniMoeForCausalLM(declared()).train(), batch()
    model(**given).loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**given).loss.backward()
    assert all(torch.equal(parameter.grad, grads[name]) for name, parameter in model.named_parameters())


def test_saved_and_loaded(tmp_path):
    from omnimoe import from_pretrained

    model = OmniMoeForCausalLM(declared(embedding_scale=32**0.5, tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    given = batch()
    assert again.config.widths == (32, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(**given).logits, model(**given).logits)
    small = shrink(again.config)
    assert small.widths == (64, 32, 64)
    assert OmniMoeForCausalLM(small).config.experts.intermediate_sizes == (96, 48, 80)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"widths": (32, 16)}, r"one for each of the 3 modalities"),
        ({"widths": (32, 0, 32)}, r"must be positive"),
        ({"widths": (16, 16, 16)}, r"largest hidden_size, which is 32"),
        ({"widths": (16, 16, 32)}, r"'text' shares the embedding table"),
        ({"keys": ("a", "b", "c")}, r"its keys are \('a', 'b', 'c'\)"),
        ({"attention": Attention.Config(num_heads=4, towers=(0, 1, 2))}, r"head_dim must be given"),
        ({"experts": RoutedExperts.Config()}, r"RoutedExperts.Config in layer 0 has no towers of different widths"),
    ],
)
def test_configs_that_mean_nothing(changes, told):
    with pytest.raises(ConfigError, match=told):
        declared(**changes)


def test_models_that_mean_nothing():
    with pytest.raises(ConfigError, match=r"share a copy of a norm"):
        OmniMoeForCausalLM(declared(norm=Norm.Config()))
    with pytest.raises(ConfigError, match=r"intermediate_sizes \(4, 4\) has 2 entries for 3 copies"):
        OmniMoeForCausalLM(declared(experts=FeedForward.Config(intermediate_sizes=(4, 4), towers=(0, 1, 2))))
    model = OmniMoeForCausalLM(declared())
    with pytest.raises(InputError, match=r"drop key_ids"):
        model(**batch(), key_ids=torch.zeros(2, 7, dtype=torch.long))
    assert model.config.base_model_tp_plan is None
    with pytest.raises(ConfigError, match=r"differ in width is not cut; load it whole"):
        select(model.config, ["text"])


def test_adapters_and_freezing_know_which_rows_meet_a_copy():
    config = declared()
    chosen = lora_targets(OmniMoeForCausalLM(config), towers=["action"])["target_parameters"]
    assert chosen
    assert all(".copies.1." in name for name in chosen)
    model = OmniMoeForCausalLM(config)
    freeze(model, ["text", "latent"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name in trained if "backbone" in name and ".copies.1." not in name] == []
    assert any(".copies.1." in name for name in trained)


def test_eight_bits():
    pytest.importorskip("torchao", reason="pip install 'omnimoe[torchao]'")
    model, given = OmniMoeForCausalLM(declared()).eval(), batch()
    with torch.no_grad():
        wanted = model(**given).logits
        quantize(model)
        found = model(**given).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
