"""Scores by where tokens stand: the rows of a table, what is added to attention, and what cannot be."""

from __future__ import annotations

import pytest
import torch

from omnimoe import OmniMoeConfig, OmniMoeForCausalLM, Tokens
from omnimoe.attend import attention_function
from omnimoe.config import ConfigError
from omnimoe.experts import FeedForward
from omnimoe.inputs import InputError
from omnimoe.layers import Attention, AttentionMask, SpanTables
from omnimoe.layers.position_bias import BiasedMask

TEXT, IMAGE = Tokens.Config(name="text", vocab_size=20), Tokens.Config(name="image", vocab_size=10)
TABLES = SpanTables.Config(reaches=(6, 0), sides=(0, 2), crosses=True)
CONFIG = OmniMoeConfig(
    hidden_size=16,
    num_layers=2,
    modalities=(TEXT, IMAGE),
    attention=Attention.Config(num_heads=2, rope=None),
    experts=FeedForward.Config(intermediate_size=24),
    mask="bidirectional",
    positions="spans",
    position_bias=TABLES,
    use_cache=False,
)


def numbered(config: SpanTables.Config = TABLES, **sizes: int) -> SpanTables:
    """Tables whose scores are numbers that tell them apart: 100 m + row of modality m, 900 + row of those between."""
    given = {"num_heads": 1, "num_layers": 1, "num_modalities": 2, **sizes}
    part = config.build(**given)
    with torch.no_grad():
        for name, table in part.tables.items():
            table.weight.copy_(100.0 * int(name) + torch.arange(len(table.weight)).unsqueeze(1))
        if part.cross is not None:
            part.cross.weight.copy_(900.0 + torch.arange(len(part.cross.weight)).unsqueeze(1))
    return part


def scores(part: SpanTables, kinds: list[int], places: list[int], valid: list[int] | None = None) -> torch.Tensor:
    given = None if valid is None else torch.tensor([valid]).bool()
    return part(torch.tensor([kinds]), torch.tensor([places]), given).of(0)[0, 0].detach()


def test_distances_of_a_line_and_its_first_token():
    found = scores(numbered(), [0] * 4, [0, 1, 2, 3])
    assert found[1:, 1:].tolist() == [[5, 4, 3], [6, 5, 4], [7, 6, 5]], "5 is at 0, larger where the query is later"
    assert (found[0, 1:].tolist(), found[1:, 0].tolist(), float(found[0, 0])) == ([11.0] * 3, [12.0] * 3, 13.0)
    turned = scores(numbered(TABLES.replace(counts_to_key=True)), [0] * 4, [0, 1, 2, 3])
    assert torch.equal(turned[1:, 1:], found[1:, 1:].T)


def test_distances_of_a_grid_by_row_and_column():
    found = scores(numbered(), [1] * 5, [0, 1, 2, 3, 4]) - 100
    assert found[1, 1:].tolist() == [4, 3, 1, 0], "of the first cell to itself, the next, the one below, the last"
    assert torch.equal(found[1:, 1:] + found[1:, 1:].T, torch.full((4, 4), 8.0)), "the other way round the other sign"
    assert (found[0, 1:].tolist(), found[1:, 0].tolist(), float(found[0, 0])) == ([9.0] * 4, [10.0] * 4, 11.0)


def test_far_distances_share_rows():
    config = SpanTables.Config(reaches=(8,), longest=(64,), sides=(0,))
    part = numbered(config, num_modalities=1)
    found = scores(part, [0] * 64, list(range(64)))[63, 1:]
    rows = found.flip(0) - 7  # by distance, from 0
    assert rows[:5].tolist() == [0, 1, 2, 3, 4], "up to half of the reach each has its own"
    assert rows[-1] == 7
    assert (rows.diff() >= 0).all(), "then they grow with the logarithm"


def test_between_spans():
    found = scores(numbered(), [0, 0, 1, 1, 0], [0, 1, 0, 1, 0])
    assert found[:2, 2:4].unique().tolist() == [900.0], "text asks a picture"
    assert found[2:4, :2].unique().tolist() == [901.0], "a picture asks text"
    assert not found[4, :2].any(), "two spans of one modality"
    assert not scores(numbered(TABLES.replace(crosses=False)), [0, 1], [0, 0])[0, 1]


def test_padding_begins_no_span():
    found = scores(numbered(), [0] * 5, [0, 0, 0, 1, 2], [0, 0, 1, 1, 1])
    assert torch.equal(found[2:, 2:], scores(numbered(), [0] * 3, [0, 1, 2]))


def test_layers_have_scores_of_their_own_or_share_them():
    part = TABLES.build(num_heads=2, num_layers=3, num_modalities=2)
    assert part.tables["0"].weight.shape == (14, 6)
    assert sum(weight.numel() for weight in part.parameters()) == TABLES.num_weights(2, 3)
    shared = TABLES.replace(by_layer=False)
    part = shared.build(num_heads=2, num_layers=3, num_modalities=2)
    assert sum(weight.numel() for weight in part.parameters()) == shared.num_weights(2, 3) == 28 + 24 + 4
    found = part(torch.tensor([[0, 0]]), torch.tensor([[0, 1]]))
    assert found.of(0) is found.of(2)


def filled() -> OmniMoeForCausalLM:
    torch.manual_seed(0)
    model = OmniMoeForCausalLM(CONFIG).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_bias" in name:
                parameter.normal_()
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[1, 2, 3, 20, 21, 22], [4, 5, 23, 24, 0, 0]])
    return ids, torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


@pytest.mark.parametrize("padded", [False, True])
def test_implementations_of_attention_agree(padded):
    model = filled()
    ids, mask = batch()
    given = {"attention_mask": mask} if padded else {}
    real = mask.bool() if padded else torch.ones_like(mask).bool()
    found = {}
    with torch.no_grad():
        for name in ("sdpa", "eager"):
            model.set_attn_implementation(name)
            found[name] = model(ids, **given).logits[real]
        shown = model(ids, **given, output_attentions=True)
        assert shown.attentions[0].shape == (2, 2, 6, 6)
        model.model.position_bias.tables["0"].weight.zero_()
        without = model(ids, **given).logits[real]
    torch.testing.assert_close(found["sdpa"], found["eager"], atol=1e-5, rtol=1e-5)
    assert float((found["sdpa"] - without).abs().max()) > 1e-3, "the scores count"


def test_recomputed_layers_have_the_same_gradients():
    grads = []
    for recomputes in (False, True):
        model = filled().train()
        if recomputes:
            model.gradient_checkpointing_enable()
        ids, mask = batch()
        model(ids, attention_mask=mask).logits[mask.bool()].square().sum().backward()
        grads.append({name: held.grad for name, held in model.named_parameters()})
    assert all(grad is not None for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4)


def test_what_cannot_add_scores_says_so():
    model = filled()
    ids, _ = batch()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention adds no learned position biases"):
        model(ids)
    mask = AttentionMask(
        rule="bidirectional", query_length=4, key_length=4, past_length=0, device=ids.device, key_ids=ids[:, :4]
    )
    heads = torch.zeros(2, 2, 4, 8)
    biased = BiasedMask.add(mask, torch.zeros(1, 2, 4, 4))
    flash = attention_function("flash_attention_2", lambda name, default: model)
    with pytest.raises(ValueError, match="cannot express the mask rule 'biased'"):
        flash(model, heads, heads, heads, biased)
    model.set_attn_implementation("sdpa")
    past = model(ids, use_cache=True).past_key_values
    with pytest.raises(InputError, match="compare whole sequences"):
        model(ids, position_ids=torch.zeros(2, 6).long(), past_key_values=past)
    with pytest.raises(ValueError, match="distance 7 is past the distances below 6"):
        model(torch.full((1, 9), 3))
    with pytest.raises(ValueError, match="distance 5 is past the 2 x 2 cells"):
        model(torch.full((1, 6), 22))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"reaches": (4,)}, "must have one number from 0 for each modality"),
        ({"reaches": (4, 4)}, "give it a reach or a side"),
        ({"longest": (3, 0)}, "longest only above a reach"),
    ],
)
def test_tables_that_cannot_be(change, told):
    with pytest.raises(ConfigError, match=told):
        TABLES.replace(**change)


def test_models_that_cannot_have_them():
    with pytest.raises(ConfigError, match="leave num_kv_heads and depth None"):
        CONFIG.replace(attention=Attention.Config(num_heads=2, num_kv_heads=1, rope=None))
    with pytest.raises(ConfigError, match="one number for each of 1 modalities"):
        OmniMoeForCausalLM(CONFIG.replace(modalities=(TEXT,)))
    assert CONFIG.base_model_tp_plan is None
