"""transformers' own models of experts run on our op: the same logits and gradients as their eager form."""

from __future__ import annotations

import pytest
import torch
import transformers

from omnimoe import backend, experts_interface
from omnimoe.ops import BackendError

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
MODELS = {
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 16},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 5, "num_experts_per_tok": 2},
    "Qwen2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                 "shared_expert_intermediate_size": 24},
    # biases, gate and up in turns, matrices the other way round, a clamped gate
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "layer_types": ["full_attention"] * 2},
    # matrices the other way round alone
    "AriaText": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "pad_token_id": None},
}  # fmt: skip


def tiny(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for key, value in model.named_parameters():
        if key.endswith("_bias"):  # zeros at first
            torch.nn.init.normal_(value, std=0.5)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("through", ["cpp", "torch"])
def test_logits_and_gradients_are_those_of_the_eager_form(name, through, request):
    if through == "cpp":
        request.getfixturevalue("compiled")
    model, ids = tiny(name), torch.randint(0, 64, (2, 9))

    def run(implementation):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        model.zero_grad()
        logits = model(ids).logits
        logits.square().mean().backward()
        return logits.detach(), {key: value.grad.clone() for key, value in model.named_parameters()}

    wanted, wanted_gradients = run("eager")
    with backend(through):
        found, gradients = run("omnimoe")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for key, right in wanted_gradients.items():
        torch.testing.assert_close(
            gradients[key], right, rtol=1e-4, atol=1e-7, msg=lambda told, key=key: f"{key}: {told}"
        )


def test_our_op_is_what_runs(monkeypatch):
    called = []
    real = experts_interface.experts_mlp
    monkeypatch.setattr(
        experts_interface, "experts_mlp", lambda *given, **more: called.append(1) or real(*given, **more)
    )
    model = tiny("Mixtral")
    model.set_experts_implementation("omnimoe")
    model(torch.randint(0, 64, (1, 4)))
    assert len(called) == 2


def test_a_network_that_we_do_not_have_is_refused_with_the_reason():
    model = tiny("GptOss")
    model.set_experts_implementation("omnimoe")
    model.model.layers[0].mlp.experts.limit = 5.0
    with pytest.raises(BackendError, match="GptOssExperts cannot run on omnimoe's kernels: it has a gate of its own"):
        model(torch.randint(0, 64, (1, 4)))
    model = tiny("Mixtral")
    model.set_experts_implementation("omnimoe")
    model.model.layers[0].mlp.experts.act_fn = torch.nn.Tanh()
    with pytest.raises(BackendError, match="MixtralExperts cannot run .*: its activation is Tanh"):
        model(torch.randint(0, 64, (1, 4)))
