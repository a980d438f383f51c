"""Learned positions, a table a modality, counted from 0 in each span of one modality."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from omnimoe import (
    Attention,
    ConfigError,
    FeedForward,
    OmniMoeConfig,
    OmniMoeForCausalLM,
    Tokens,
    freeze,
    from_pretrained,
)
from omnimoe.blocks import span_counts
from omnimoe.layers import RowLayout
from omnimoe.layers.embedding import LearnedPositions
from omnimoe.stages import pipeline_stage

TEXT, IMAGE = Tokens.Config(name="text", vocab_size=10), Tokens.Config(name="image", vocab_size=6)
CONFIG = OmniMoeConfig(
    hidden_size=16,
    num_layers=1,
    modalities=(TEXT, IMAGE),
    experts=FeedForward.Config(intermediate_size=16, towers="modality"),
    positions="spans",
    learned_positions=(12, 0),
    position_offset=2,
    head_bias=True,
)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("padding", ["none", "anywhere"])
@pytest.mark.parametrize("packed", [False, True])
def test_counts_against_a_walk(seed, padding, packed):
    draw = random.Random(seed)
    length = draw.randint(1, 12)
    kinds = [[draw.randrange(3) for _ in range(length)] for _ in range(3)]
    real = [[padding == "none" or draw.random() < 0.6 for _ in range(length)] for _ in range(3)]
    documents = [[place // 4 for place in range(length)] for _ in range(3)]
    found = span_counts(
        torch.tensor(kinds),
        None if padding == "none" else torch.tensor(real),
        torch.tensor(documents) if packed else None,
    )
    for row in range(3):
        last, count = None, 0
        for place in range(length):
            if real[row][place]:
                now = (kinds[row][place], documents[row][place] if packed else 0)
                count = count + 1 if now == last else 0
                last = now
                assert int(found[row, place]) == count, (kinds, real)


@pytest.mark.parametrize("sizes", [(5, 4), (5, 0), (0, 4)], ids=str)
def test_each_row_gets_its_place(sizes):
    layer = LearnedPositions(sizes, 4, offset=1)
    kinds = torch.tensor([[1, 0, 0, 1, 1]])
    rows = RowLayout.build(kinds, num_keys=2)
    x, places = torch.randn(5, 4), torch.tensor([2, 0, 3, 0, 1])
    found = layer(x, rows, rows.to_rows(places[None]))
    tables = layer.weight.split(list(sizes))
    for row, kind, place in zip(
        range(5), rows.to_rows(kinds[..., None])[:, 0], rows.to_rows(places[None]), strict=True
    ):
        wanted = x[row] + tables[kind][place + 1] if sizes[kind] else x[row]
        torch.testing.assert_close(found[row], wanted)
    if sizes[0]:
        with pytest.raises(ValueError, match="position 4 of modality 0 is past its table of 5"):
            layer(x, rows, rows.to_rows(torch.tensor([[0, 4, 4, 0, 0]])))


def test_a_model_adds_them_where_embeddings_are_given_too_and_generates_on():
    torch.manual_seed(0)
    model = OmniMoeForCausalLM(CONFIG).eval()
    ids = torch.tensor([[11, 12, 3, 4, 5]])
    with torch.no_grad():
        entered = model(ids, output_hidden_states=[0]).hidden_states[0]
        words = model.get_input_embeddings()(ids)
        wanted = words.clone()
        wanted[0, 2:] += model.model.places.weight[2:5]
        torch.testing.assert_close(entered, wanted)
        given = model(inputs_embeds=words, modality_ids=torch.tensor([[1, 1, 0, 0, 0]])).logits
        torch.testing.assert_close(given, model(ids).logits)
        model.lm_head.bias.zero_()
        plain = model(ids).logits
        model.lm_head.bias.normal_()
        torch.testing.assert_close(model(ids).logits, plain + model.lm_head.bias)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    prompts = torch.cat((ids, torch.tensor([[0, 0, 11, 12, 3]])))
    model.lm_head.bias.data[10:] = -1e4  # text goes on
    made = model.generate(prompts, attention_mask=mask, max_new_tokens=3, do_sample=False)
    grown, seen = prompts, mask
    with torch.no_grad():
        for _ in range(3):
            grown = torch.cat((grown, model(grown, attention_mask=seen).logits[:, -1:].argmax(-1)), dim=1)
            seen = torch.nn.functional.pad(seen, (0, 1), value=1)
    assert made.tolist() == grown.tolist()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"learned_positions": (12,)}, "one number of rows for each of the 2 modalities"),
        ({"learned_positions": (12, -1)}, "0 for none"),
        ({"widths": (16, 16), "attention": Attention.Config(num_heads=2, head_dim=8)}, "leave widths"),
        ({"learned_positions": (2, 0)}, "position_offset 2 must lie inside"),
        ({"positions": "span"}, "'grids' or 'spans', got 'span'"),
    ],
)
def test_tables_that_cannot_be_are_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        CONFIG.replace(**change)


def test_a_model_that_is_cut_keeps_the_tables_of_what_stays(tmp_path):
    torch.manual_seed(0)
    config = CONFIG.replace(learned_positions=(12, 9), aligned_size=8, tie_word_embeddings=False)
    whole = OmniMoeForCausalLM(config).eval()
    whole.lm_head.bias.data.normal_()
    whole.save_pretrained(tmp_path)
    for name, ids in (("text", torch.tensor([[3, 4, 5]])), ("image", torch.tensor([[11, 12, 13]]))):
        cut = from_pretrained(tmp_path, towers=[name]).eval()
        assert cut.config.learned_positions == (12 if name == "text" else 9,)
        with torch.no_grad():
            size = cut.config.vocab_size
            torch.testing.assert_close(cut(ids).logits, whole(ids).logits[..., :size])
            torch.testing.assert_close(cut.align(name, ids), whole.align(name, ids))


def test_stages_add_them_once():
    torch.manual_seed(0)
    model = OmniMoeForCausalLM(CONFIG.replace(num_layers=2, aligned_size=8)).eval()
    ids = torch.tensor([[11, 12, 3, 4, 5]])
    with torch.no_grad():
        wanted = model(ids).logits
        first, last = (pipeline_stage(copy.deepcopy(model), index, 2) for index in range(2))
        found, _ = last(*first(input_ids=ids), input_ids=ids)
    torch.testing.assert_close(found, wanted)


def test_a_frozen_modality_keeps_its_table_its_map_and_its_biases():
    torch.manual_seed(0)
    every = {"towers": "modality"}
    config = CONFIG.replace(learned_positions=(12, 9), aligned_size=8, norm=CONFIG.norm.replace(**every))
    config = config.replace(attention=config.attention.replace(**every), final_norm=config.norm)
    model = OmniMoeForCausalLM(config)
    held = {name: part.detach().clone() for name, part in model.named_parameters()}
    freeze(model, ["text"])
    ids = torch.tensor([[3, 4, 5, 11, 12, 13]])
    text, image = model.align("text", ids[:, :3]), model.align("image", ids[:, 3:])
    (model(ids, labels=ids).loss + (text - image).square().sum()).backward()
    torch.optim.SGD(model.parameters(), 0.5).step()
    for name, own in (("model.places.weight", 12), ("aligned.weight", 1), ("lm_head.bias", 10)):
        now = model.get_parameter(name)
        assert torch.equal(now[:own], held[name][:own]), name
        assert not torch.equal(now[own:], held[name][own:]), name
