"""Tables: what they expand to, that both sides are tiled exactly, and what is refused."""

from __future__ import annotations

import pytest
import torch

from omnimoe.convert import Deinterleave, Part, Permute, Reshape, Rows, RuleError, Transpose, bank, make_plan, rename
from omnimoe.convert.changes import AS_IS

RULES = [
    rename("embed", "tok.weight"),
    bank("q", "q.weight", "q_gen.weight"),
    bank("bias", "q.bias", "q_gen.bias"),
    bank("gate_up", ("e.0.w1", "e.0.w3"), ("e.1.w1", "e.1.w3"), ("e.2.w1", "e.2.w3")),
    rename("k", Rows("kv", 0, 4)),
    rename("v", Rows("kv", 4, 6)),
    rename("joined", Part("long", 5), "short"),
    bank("patch", "conv", change=Reshape((8, 3, 2, 2), (8, 12))),
    bank("o", "o_in_out", change=Transpose()),
    rename("scalar", "count"),
]
SHAPES = {
    "embed": (11, 4),
    "q": (2, 6, 4),
    "bias": (2, 6),
    "gate_up": (3, 10, 4),
    "k": (4, 4),
    "v": (2, 4),
    "joined": (7, 3),
    "patch": (1, 8, 12),
    "o": (1, 4, 6),
    "scalar": (),
}
PUBLISHED = {
    "tok.weight": (11, 4),
    "q.weight": (6, 4),
    "q_gen.weight": (6, 4),
    "q.bias": (6,),
    "q_gen.bias": (6,),
    **{f"e.{expert}.{name}": (5, 4) for expert in range(3) for name in ("w1", "w3")},
    "kv": (6, 4),
    "long": (5, 3),
    "short": (2, 3),
    "conv": (8, 3, 2, 2),
    "o_in_out": (6, 4),
    "count": (),
}


def test_the_published_side_follows_from_ours():
    assert make_plan(RULES, SHAPES).published == PUBLISHED


def test_reading_and_writing_are_each_others_inverse():
    plan = make_plan(RULES, SHAPES)
    numbers = iter(range(10**6))
    theirs = {name: torch.empty(shape) for name, shape in plan.published.items()}
    for tensor in theirs.values():
        tensor.view(-1).copy_(torch.tensor([next(numbers) for _ in range(tensor.numel())]))
    ours = {name: torch.full(shape, -1.0) for name, shape in plan.ours.items()}
    for piece in plan.pieces:
        held = theirs[piece.published]
        held = held if piece.rows is None else held[slice(*piece.rows)]
        assert tuple(held.shape) == piece.shape
        piece.place(ours[piece.ours]).copy_(piece.change.into(held))
    everything = torch.cat([tensor.flatten() for tensor in ours.values()])
    assert sorted(everything.tolist()) == list(range(len(everything))), "every number once"
    assert torch.equal(ours["gate_up"][1], torch.cat((theirs["e.1.w1"], theirs["e.1.w3"])))
    assert torch.equal(ours["q"], torch.stack((theirs["q.weight"], theirs["q_gen.weight"])))
    assert torch.equal(ours["o"][0], theirs["o_in_out"].T)
    for name, pieces in plan.by_published().items():
        parts = [piece.change.back(piece.place(ours[piece.ours])) for piece in pieces]
        assert torch.equal(torch.cat(parts) if len(parts) > 1 else parts[0], theirs[name])


def test_pieces_come_in_the_order_of_memory():
    for name, pieces in make_plan(RULES, SHAPES).by_ours().items():
        ours = torch.arange(torch.Size(SHAPES[name]).numel()).reshape(SHAPES[name])
        told = torch.cat([piece.place(ours).flatten() for piece in pieces])
        assert told.tolist() == list(range(ours.numel())), name


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([*RULES, rename("more", "more")], "a rule gives more, which the model does not have"),
        ([*RULES, rename("k", "again")], "two rules give k"),
        (RULES[1:], "1 tensors of the model have no rule, embed for one"),
        ([*RULES[:1], bank("q", "q.weight"), *RULES[2:]], "q has 2 copies, and its rule gives 1"),
        ([*RULES[:-1], bank("scalar", "count")], "has copies of single numbers"),
        ([*RULES[:4], rename("k", Rows("kv", 0, 3)), *RULES[5:]], "k takes 4 rows of kv, and its rule gives 0 to 3"),
        ([*RULES[:5], rename("v", Rows("kv", 5, 7)), *RULES[6:]], "the rules that take kv leave a hole or overlap"),
        ([*RULES[:5], rename("v", Rows("kv", 3, 5)), *RULES[6:]], "the rules that take kv leave a hole or overlap"),
        ([*RULES[:5], rename("v", "tok.weight"), *RULES[6:]], "the rules that take tok.weight leave a hole or overlap"),
        ([*RULES[:6], rename("joined", "a", "b"), *RULES[7:]], "the 7 rows of joined do not divide over the 2 parts"),
        ([*RULES[:6], rename("joined", Part("a", 8), "b"), *RULES[7:]], "the 7 rows of joined do not divide"),
        ([*RULES[:6], rename("joined", Part("a", 3), Part("b", 3)), *RULES[7:]], "the 7 rows of joined do not divide"),
    ],
)
def test_a_table_that_does_not_tile_is_refused(rules, message):
    with pytest.raises(RuleError, match=message):
        make_plan(rules, SHAPES)


def test_names_that_stay_fresh_need_no_rule():
    plan = make_plan(RULES[1:], SHAPES, fresh=["embed"])
    assert "embed" not in plan.ours
    assert "tok.weight" not in plan.published


@pytest.mark.parametrize(
    "change",
    [
        AS_IS,
        Transpose(),
        Permute((1, 0)),
        Reshape((12, 8), (12, 4, 2)),
        Deinterleave(),
        Deinterleave(6),
        Deinterleave(6, 2),
        Deinterleave(4, 0),
    ],
)
def test_changes_have_inverses(change):
    tensor = torch.arange(96.0).reshape(12, 8)
    turned = change.into(tensor)
    assert torch.equal(change.back(turned), tensor)
    assert sorted(turned.flatten().tolist()) == tensor.flatten().tolist()
    assert change.into(tensor.to("meta")).shape == turned.shape


def test_neighbours_become_halves_after_what_stays():
    rows = torch.arange(12.0).unsqueeze(1)
    assert Deinterleave(6, 2).into(rows).flatten().tolist() == [0, 1, 2, 4, 3, 5, 6, 7, 8, 10, 9, 11]
