"""What a router chose stays chosen when its layer runs again in backward."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from omnimoe.recompute import CHOOSING, Choices
from tests.declarations import DECLARATIONS, build, ids_like

ROUTED = ("moe", "moe_sigmoid", "moma_top_k", "moma", "expert_choice")


def unsteady(model: nn.Module) -> None:
    """Attention that gives something else each time, before routers that it can tip: the experts' scores differ by less
    than bfloat16 can tell, so nearly every row is a tie."""
    generator = torch.Generator().manual_seed(5)

    def shake(module: nn.Module, given: tuple, result: tuple) -> tuple:
        mixed, weights = result
        noise = torch.randn(mixed.shape, generator=generator, dtype=torch.float32) / 8
        return mixed * (1 + noise).to(mixed.dtype), weights

    for layer in model.model.backbone.layers:
        layer.self_attn.register_forward_hook(shake)
    for name, parameter in model.named_parameters():
        if "scorer" in name:
            parameter.data = parameter.data[:1] + 2**-9 * torch.randn_like(parameter.data)


def choices_of(model: nn.Module, ids: Tensor) -> list[list[Tensor]]:
    """For each layer what the bank of experts was given, forward and in backward."""
    seen: list[list[Tensor]] = [[] for _ in model.model.backbone.layers]

    def note(index: int):
        def hook(module: nn.Module, given: tuple, named: dict) -> None:
            seen[index].append(torch.cat((given[1].long(), named["token_index"])))

        return hook

    for index, layer in enumerate(model.model.backbone.layers):
        layer.mlp.experts.register_forward_pre_hook(note(index), with_kwargs=True)
    model(ids, labels=ids).loss.backward()
    return seen


def tied(name: str, *, use_reentrant: bool) -> tuple[nn.Module, Tensor]:
    config = DECLARATIONS[name]
    model = build(config).to(torch.bfloat16).train()
    unsteady(model)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    return model, ids_like(config, 4, 24)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ROUTED)
def test_a_recomputed_layer_routes_as_it_did(name, use_reentrant):
    model, ids = tied(name, use_reentrant=use_reentrant)
    for first, second in choices_of(model, ids):
        assert torch.equal(first, second)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_it_would_route_otherwise_if_nothing_were_kept(use_reentrant, monkeypatch):
    monkeypatch.setattr(
        Choices, "__torch_dispatch__", lambda self, func, types, args=(), kw=None: func(*args, **kw or {})
    )
    model, ids = tied("moe", use_reentrant=use_reentrant)
    assert not all(torch.equal(first, second) for first, second in choices_of(model, ids))


def test_choices_are_given_again_in_their_order_and_other_operations_run():
    choices = Choices()
    given = torch.tensor([[1.0, 3.0, 2.0]])
    with choices:
        first = given.topk(1).indices, given.argmax(), given > 2
    choices.rewind()
    other = -given
    with choices:
        again = other.topk(1).indices, other.argmax(), other > 2
        doubled = other * 2
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert torch.equal(doubled, -2 * given)


def test_what_a_caller_does_to_a_choice_does_not_change_what_is_kept():
    choices, given = Choices(), torch.tensor([4.0, 1.0])
    with choices:
        given.sort().values.mul_(0)
    choices.rewind()
    with choices:
        values = given.sort().values
        assert values.tolist() == [1.0, 4.0]
        values.zero_()
    choices.rewind()
    with choices:
        assert given.sort().values.tolist() == [1.0, 4.0]


def test_a_chosen_score_has_its_gradient_where_the_choice_was_made_before():
    choices, given = Choices(), torch.tensor([1.0, 3.0, 2.0], requires_grad=True)
    with choices:
        given.topk(2)
    choices.rewind()
    with choices:
        given.topk(2).values.sum().backward()
    assert given.grad.tolist() == [0.0, 1.0, 1.0]


def test_only_every_second_layer_is_recomputed_where_that_is_asked():
    config = DECLARATIONS["moe"]
    model, ids = build(config).train(), ids_like(config)
    model.activation_checkpointing_enable(every_n_layers=2)
    calls = [len(runs) for runs in choices_of(model, ids)]
    assert calls == [2, 1]


@pytest.mark.parametrize(
    ("name", "use_reentrant"),
    [
        ("moe", False),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("mot", *ROUTED[1:])),
        pytest.param("moe", True, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_step_recomputes_layers_by_choices_of_its_forward(name, use_reentrant):
    torch._dynamo.reset()
    config = DECLARATIONS[name].replace(num_layers=1)
    plain, traced, ids = build(config).train(), build(config).train(), ids_like(config)
    traced.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    ran: dict[str, list] = {"forward": [], "backward": []}

    def note(side: str):
        def compiler(graph: torch.fx.GraphModule, given: list):
            ran[side] += [getattr(node.target, "overloadpacket", None) for node in graph.graph.nodes]
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(
        fw_compiler=note("forward"), bw_compiler=note("backward"), partition_fn=min_cut_rematerialization_partition
    )
    wanted, found = plain(ids, labels=ids), torch.compile(traced, fullgraph=True, backend=backend)(ids, labels=ids)
    torch.testing.assert_close(found.loss, wanted.loss)
    wanted.loss.backward()
    found.loss.backward()
    for (place, one), other in zip(plain.named_parameters(), traced.named_parameters(), strict=True):
        torch.testing.assert_close(other[1].grad, one.grad, atol=1e-5, rtol=1e-3, msg=place)
    assert torch.ops.omnimoe.rms_norm in ran["backward"], "nothing was recomputed"
    assert CHOOSING & set(ran["forward"]) or name == "mot"
    ranking = {torch.ops.aten.topk, torch.ops.aten.sort, torch.ops.aten.argmax, torch.ops.aten.searchsorted}
    assert not ranking & set(ran["backward"]), "chosen once more"
