"""Positions in time, row and column, by the shapes of pictures and clips."""

from __future__ import annotations

import pytest
import torch

from omnimoe import OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.config import ConfigError
from omnimoe.connectors import AsIs
from omnimoe.encoders import Features
from omnimoe.experts import FeedForward, RoutedExperts
from omnimoe.grids import grid_positions
from omnimoe.inputs import InputError
from omnimoe.layers import Attention, Rope
from omnimoe.modalities import Connected, Tokens
from omnimoe.routers import ByModalityRouter, TopKRouter

SEEN, BEGIN, END, CLIP = 10, 11, 12, 13
CONFIG = OmniMoeConfig(
    hidden_size=16,
    num_layers=2,
    modalities=(
        Tokens.Config(name="text", vocab_size=20),
        Connected.Config(
            name="vision", channels=16, connector=AsIs.Config(), begin_id=BEGIN, end_id=END, placeholder_id=SEEN,
            more_ids=((14, 15, CLIP),),
        ),
    ),
    attention=Attention.Config(num_heads=2, rope=Rope.Config(axes=(1, 2, 1, 0))),
    experts=FeedForward.Config(intermediate_size=24),
    positions="grids",
    initializer_range=0.3,
)  # fmt: skip
SHAPES = {"vision": torch.tensor([[1, 2, 3], [2, 1, 2]])}
IDS = torch.tensor([[5, BEGIN, *[SEEN] * 6, END, 6, 14, *[CLIP] * 4, 15, 7]])


def places(ids: torch.Tensor, shapes=SHAPES, **given) -> list[list[list[int]]]:
    table = CONFIG.modality_of_ids()
    return grid_positions(CONFIG, table[ids], shapes, **given).tolist()


def test_a_span_is_counted_from_its_start_and_goes_on_behind_its_longest_side():
    assert places(IDS)[0] == [
        *([0, 0, 0], [1, 1, 1]),
        *([2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4]),
        *([5, 5, 5], [6, 6, 6], [7, 7, 7]),
        *([8, 8, 8], [8, 8, 9], [9, 8, 8], [9, 8, 9]),
        *([10, 10, 10], [11, 11, 11]),
    ]


def test_padding_in_front_and_packed_documents_count_for_nothing():
    wanted = places(IDS)[0]
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), IDS), dim=1)
    assert places(padded, valid=torch.arange(padded.shape[1])[None] >= 3)[0][3:] == wanted
    segments = torch.tensor([[0] * 9 + [1] * 8])
    packed = places(IDS, segment_ids=segments)[0]
    assert packed[:9] == wanted[:9]
    assert packed[9:] == [[place - 6 for place in cell] for cell in wanted[9:]]


def test_words_alone_are_counted_in_time():
    assert places(torch.tensor([[4, 5, 6]]), {}) == [[[0, 0, 0], [1, 1, 1], [2, 2, 2]]]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([[1, 2, 3]], "become 6 rows, and the sequence has 10 positions"),
        ([[2, 1, 2], [1, 2, 3]], "4 rows of span 0|6 rows of span 1"),
    ],
)
def test_shapes_that_do_not_fit_the_sequence_are_refused(shapes, message):
    with pytest.raises(InputError, match=message):
        places(IDS, {"vision": torch.tensor(shapes)})


def features() -> Features:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 6, 16, generator=generator)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    return Features(rows=rows, pooled=rows.mean(1), mask=mask, shapes=SHAPES["vision"])


@torch.no_grad()
def test_the_model_counts_them_itself():
    model = OmniMoeForCausalLM(CONFIG).eval()
    own = torch.tensor([places(IDS)[0]])
    given = {"features": {"vision": features()}}
    torch.testing.assert_close(model(IDS, **given).logits, model(IDS, position_ids=own, **given).logits)
    flat = torch.arange(IDS.shape[1])[None]
    assert not torch.allclose(model(IDS, **given).logits, model(IDS, position_ids=flat, **given).logits)
    made = model.generate(IDS, **given, max_new_tokens=3, do_sample=False)
    assert not set(made[0, IDS.shape[1] :].tolist()) & {SEEN, BEGIN, CLIP, 14}, "nothing could be seen there"
    whole = model(made[:, :-1], **given).logits.argmax(-1)[:, IDS.shape[1] - 1 :]
    barred = torch.isin(whole, torch.tensor([SEEN, BEGIN, CLIP, 14]))
    assert torch.equal(made[:, IDS.shape[1] :][~barred], whole[~barred])


@torch.no_grad()
def test_markers_meet_the_experts_of_their_span():
    """And stay words: they have their own embeddings, and labels may stand there."""
    experts = RoutedExperts.Config(
        num_experts=4,
        pools=((2, 24), (2, 8)),
        router=ByModalityRouter.Config(experts=(2, 2), router=TopKRouter.Config(top_k=1)),
    )
    chosen = {}
    for markers in ("text", "key"):
        model = OmniMoeForCausalLM(CONFIG.replace(experts=experts, markers=markers)).eval()
        out = model(IDS, features={"vision": features()}, labels=IDS)
        routing, rows = out.routings[0], out.rows
        pool = torch.zeros(len(rows), dtype=torch.int64)
        pool[routing.token_index] = routing.expert_ids // 2
        chosen[markers] = rows.to_time(pool)[0].tolist()
        assert int(out.counts["text"]) == 6
    seen = torch.isin(IDS[0], torch.tensor([SEEN, CLIP])).long()
    ends = torch.isin(IDS[0], torch.tensor([BEGIN, END, 14, 15])).long()
    assert chosen == {"text": seen.tolist(), "key": (seen + ends).tolist()}
    assert CONFIG.replace(markers="key").modality_of_ids()[[BEGIN, END, 14, 15]].tolist() == [0] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "grid"}, r"positions must be .*'grids'"),
        ({"markers": "keys"}, "must be 'text', 'own' or 'key'"),
        ({"markers": "key", "keys": ("und", "gen")}, "drop one of them"),
        ({"modalities": (CONFIG.modalities[0], CONFIG.modalities[1].replace(more_ids=((14, 15),)))}, "begin, end and"),
        ({"modalities": (CONFIG.modalities[0], CONFIG.modalities[1].replace(more_ids=((14, 15, 99),)))}, "outside"),
    ],
)
def test_configs_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        CONFIG.replace(**changes)
