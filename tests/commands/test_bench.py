"""``omnimoe bench``: everybody is right before he is timed, and what is told is what was measured."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from omnimoe.bench import measure
from omnimoe.bench.measure import BOTH, DECODING, FORWARD, check, dense_work, flops, kinds, seconds, work
from omnimoe.bench.memory import Meter, saved_bytes
from omnimoe.bench.peers import LOOP, OURS, PEERS, Peer, peers_for
from omnimoe.bench.problem import draw, draw_routing
from omnimoe.bench.run import mean_ratios, named
from omnimoe.bench.shapes import FULL, MINI, ROUTINGS, SHAPES, Shape, default_shapes
from omnimoe.cli import main
from omnimoe.plots import draw_bars

SMALL = Shape(24, 32, 16, 4, 2, "small")


def test_shapes_are_those_of_the_models():
    assert set(SHAPES) == {*FULL, *MINI}
    assert not set(FULL) & set(MINI)
    assert default_shapes("cuda") == default_shapes("cuda:1") == list(FULL)
    mixtral, rank = FULL["mixtral_8x7b"], FULL["dsv3_ep32"]
    assert (mixtral.rows_per_expert, rank.rows_per_expert) == (8192, 4096)
    tera = 6 * mixtral.rows * mixtral.hidden_size * mixtral.intermediate_size / 1e12
    assert tera == pytest.approx(23.1, abs=0.05)
    assert named(["moma_tiny"], tokens=8)["moma_tiny"].tokens == 8
    with pytest.raises(ValueError, match="unknown shape 'mixtral'; known: mixtral_8x7b"):
        named(["mixtral"])


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing_is_what_it_is_called_and_takes_no_expert_twice(routing):
    shape = Shape(2000, 4, 4, 16, 3, "")
    chosen, weights = draw_routing(routing, shape, "cpu", torch.Generator().manual_seed(0))
    assert chosen.shape == weights.shape == (2000, 3)
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    assert (weights >= 0).all()
    counts = chosen.flatten().bincount(minlength=16)
    if routing == "uniform":
        assert counts.max() < 1.3 * counts.min()
    elif routing == "zipf":
        assert counts[0] > 1.3 * counts[1] > 1.3 * counts[5] > 1.3 * counts[15] > 0
    else:
        assert counts.tolist() == [2000] * 3 + [0] * 13


def test_an_unknown_routing_is_refused():
    with pytest.raises(ValueError, match="unknown routing 'even'; known: uniform, zipf, one-hot"):
        draw("experts_mlp", SMALL, torch.float32, "cpu", routing="even")


def test_a_problem_is_drawn_alike_each_time():
    one, two = (draw("experts_mlp", SMALL, torch.bfloat16, "cpu", seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.operands, two.operands, strict=True))
    assert not torch.equal(one.operands[0], draw("experts_mlp", SMALL, torch.bfloat16, "cpu").operands[0])
    assert one.flops == 6 * 48 * 32 * 16
    assert flops(one, BOTH) == 3 * flops(one, FORWARD)
    assert kinds(one) == (FORWARD, BOTH)


@pytest.mark.parametrize("op", ["experts_mlp", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_peer_that_can_is_right(op, dtype, routing):
    problem = draw(op, SMALL, dtype, "cpu", routing=routing)
    errors, reasons = check(problem, peers_for(op, backends=["reference"]))
    assert set(reasons) <= {"liger"}
    assert {"loop", "torch", OURS, f"{OURS}/reference"} <= set(errors)
    names = {"y", "gradient of x", *(f"gradient of {name}" for name in ("gate_up_proj", "down_proj", "weights"))}
    assert set(errors[OURS]) == (names if op == "experts_mlp" else {"y", "gradient of x", "gradient of weight"})


def test_decoding_has_no_gradients():
    problem = draw("experts_mlp", Shape(1, 32, 16, 4, 2, "", is_decoding=True), torch.float32, "cpu")
    errors, _ = check(problem, peers_for("experts_mlp"))
    assert kinds(problem) == (DECODING,)
    assert set(errors[OURS]) == {"y"}


def peer(call) -> Peer:
    return Peer("one", "torch", "", {"experts_mlp": call})


def test_who_is_wrong_or_fails_is_not_timed_and_told():
    problem = draw("experts_mlp", SMALL, torch.float32, "cpu")
    right = LOOP.calls["experts_mlp"]

    def fails(*_):
        raise RuntimeError("no such kernel\nand more")

    for call, told in (
        (lambda *given: 1.001 * right(*given), "is 1.0e-03, above 4e-06"),
        (lambda *given: right(*given) * float("nan"), "is inf, above"),
        (lambda problem, x, *rest: right(problem, x.detach() + 0 * x, *rest), "the error of gradient of x is 1.0e+00"),
        (fails, "RuntimeError: no such kernel"),
    ):
        _, reasons = check(problem, [peer(call)])
        assert told in reasons["one"]
        assert "\n" not in reasons["one"]


def test_the_dense_yardstick_has_as_many_flop():
    from torch.utils.flop_counter import FlopCounterMode

    for op in ("experts_mlp", "grouped_mm"):
        problem = draw(op, SMALL, torch.float32, "cpu")
        for kind in kinds(problem):
            job = dense_work(problem, kind)
            with FlopCounterMode(display=False) as counter:
                job()
            assert counter.get_total_flops() == flops(problem, kind)


def test_rounds_go_in_turn_and_every_other_one_backwards(monkeypatch):
    monkeypatch.setattr(measure, "LEAST_SECONDS", 0.0)
    order: list[str] = []
    jobs = {name: (lambda name=name: order.append(name) or []) for name in "ab"}
    found = seconds(jobs, 3, torch.device("cpu"))
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3}
    assert "".join(order) == "aabb" + "ba" + "ab" + "ba"  # a call to warm up and one to count, then the rounds


def test_what_is_kept_for_backward_is_counted_once_and_without_weights():
    problem = draw("experts_mlp", SMALL, torch.float32, "cpu")
    x = problem.operands[0]
    assert saved_bytes(problem, peer(lambda problem, x, into, down, weights: x @ into[0].t())) == x.nbytes
    twice = peer(lambda problem, x, into, down, weights: x @ into[0].t() + x @ into[1].t() + x.exp().sum())
    assert saved_bytes(problem, twice) == 2 * x.nbytes
    assert saved_bytes(problem, PEERS[OURS]) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_the_most_memory_at_once_is_that_of_a_process_of_its_own():
    shape = Shape(4096, 512, 512, 2, 1, "")
    drawn = {"op": "grouped_mm", "shape": shape, "dtype": torch.float32, "device": "cpu"}
    found = Meter(1).peak_bytes("loop", FORWARD, **drawn)
    if found is None:
        pytest.skip("the kernel does not set its mark back here")
    result = 4096 * 1024 * 4
    assert 0.9 * 2 * result <= found <= 1.3 * 2 * result  # the parts, and all of them in one


def test_peers_by_name():
    assert [peer.name for peer in peers_for("experts_mlp", ["torch"])] == ["torch", OURS]
    assert [peer.name for peer in peers_for("grouped_mm")] == ["loop", "torch", OURS]
    assert peers_for("grouped_mm", backends=["reference"])[-1].name == "omnimoe/reference"
    with pytest.raises(ValueError, match="no peer 'transformers' for grouped_mm; there are loop, torch, omnimoe"):
        peers_for("grouped_mm", ["transformers"])
    assert all(peer.version for peer in PEERS.values() if peer.name != "liger")


RUN = ["bench", "--shapes", "moma_tiny", "olmoe_1b_7b_mini_decode", "--tokens", "4", "--dtype", "float32"]
QUICK = ["--rounds", "2", "--no-memory", "--peers", "torch", "transformers"]


def test_the_command_prints_draws_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "LEAST_SECONDS", 0.0)
    out, plot = tmp_path / "new" / "out.json", tmp_path / "plot.png"
    assert main([*RUN, *QUICK, "--out", str(out), "--plot", str(plot)]) == 0
    told = capsys.readouterr().out
    assert all(
        part in told for part in ("float32, forward and backward", "decoding", "moma_tiny", "geometric", "dense")[:3]
    )
    result = json.loads(out.read_text())
    row = result["results"]["float32"]["moma_tiny"]
    assert set(row["work"][FORWARD]) == {"dense", "torch", "transformers", OURS}
    ours, torchs = row["work"][BOTH][OURS], row["work"][BOTH]["torch"]
    assert ours["ratio"] == 1
    assert torchs["ratio"] == pytest.approx(torchs["seconds"] / ours["seconds"])
    assert torchs["seconds"] == min(torchs["rounds"])
    assert len(torchs["rounds"]) == 2
    assert ours["GFLOP/s"] == pytest.approx(18 * 4 * 256 * 704 / ours["seconds"] / 1e9)
    assert result["peers"]["transformers"]["version"]
    assert mean_ratios(result, "float32", BOTH) == {
        name: pytest.approx(row["work"][BOTH][name]["ratio"]) for name in ("torch", "transformers")
    }
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_command_fails_where_our_own_results_are_wrong(capsys, monkeypatch):
    monkeypatch.setitem(measure.BOUNDS, torch.float32, 0.0)
    assert main([*RUN, *QUICK, "--json"]) == 1
    out, complaint = capsys.readouterr()
    result = json.loads(out)
    assert set(result["results"]["float32"]["moma_tiny"]["work"][FORWARD]) == {"dense"}
    assert "our own results were not timed: float32 moma_tiny: the error of" in complaint


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--shapes", "moma"], "unknown shape 'moma'"),
        (["--peers", "tutel"], "no peer 'tutel' for experts_mlp"),
        (["--rounds", "0"], "must be at least 1"),
        (["--device", "warp"], "--device warp cannot be used here"),
        (["--device", "meta"], "it measures on cpu and cuda, not on 'meta'"),
        (["--backends", "cudnn"], "unknown backend 'cudnn'"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, arguments, told):
    assert main(["bench", *arguments]) in (1, 2)
    out, complaint = capsys.readouterr()
    assert told in complaint
    assert complaint.count("\n") == 1
    assert not out


def test_bars_leave_out_what_is_not_there(tmp_path):
    panels = {"one": {"line": [3.0, 4.0], "a": [1.0, None], "b": [None, 2.0]}, "two": {"a": [1.0, 2.0]}}
    path = draw_bars(panels, ["x", "y"], tmp_path / "bars.png", ylabel="height", mark="line", title="what")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_work_leaves_operands_as_they_were():
    problem = draw("experts_mlp", SMALL, torch.float32, "cpu")
    before = [part.clone() for part in problem.operands]
    for each in peers_for("experts_mlp", ["loop", "torch", "transformers"]):
        assert len(work(problem, each.calls["experts_mlp"], BOTH)()) == 5
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(before, problem.operands, strict=True))
