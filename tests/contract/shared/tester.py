"""What the shared suite asks of a model's tests: a tiny config, a batch, and the classes."""

from __future__ import annotations

import torch
from transformers.testing_utils import torch_device

from omnimoe import OmniMoeConfig, OmniMoeForCausalLM, OmniMoeModel
from omnimoe.experts import FeedForward, RoutedExperts
from omnimoe.layers import Attention, Norm
from omnimoe.modalities import Tokens
from omnimoe.routers import ByModalityRouter, TopKRouter


def declaration(kind: str, *, hidden_size: int = 32) -> OmniMoeConfig:
    """A tiny model of one kind: ``dense``, ``mot``, ``moma`` or ``moe``.

    The suite trains on ids 1 to 19 and takes others by chance; the vocabulary is divided so that both modalities have
    some of either.
    """
    towers = "modality" if kind == "mot" else "shared"
    # the suite compares ranks with one batch of all their rows, which none of them balances alone
    top_k = TopKRouter.Config(top_k=2, expert_bias="shared", load_balance_scope="ranks")
    top_1 = TopKRouter.Config(top_k=1, normalize=False, load_balance_scope="ranks")
    by_modality = ByModalityRouter.Config(experts=(2, 2), router=top_1)
    experts = {
        "moma": RoutedExperts.Config(num_experts=4, intermediate_size=32, router=by_modality),
        "moe": RoutedExperts.Config(num_experts=4, intermediate_size=32, router=top_k),
    }
    return OmniMoeConfig(
        hidden_size=hidden_size,
        num_layers=2,
        modalities=(Tokens.Config(name="text", vocab_size=11), Tokens.Config(name="image", vocab_size=88)),
        attention=Attention.Config(num_heads=4, num_kv_heads=2, head_dim=8, towers=towers),
        experts=experts.get(kind, FeedForward.Config(intermediate_size=32, towers=towers)),
        norm=Norm.Config(towers=towers),
        final_norm=Norm.Config(towers=towers),
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


class OmniMoeTester:
    """Sizes and batches.

    Args:
        parent: the test case.
        kind: of :func:`declaration`.
    """

    base_model_class = OmniMoeModel
    causal_lm_class = OmniMoeForCausalLM
    batch_size = 13
    seq_length = 7
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_key_value_heads = 2
    head_dim = 8
    vocab_size = 99
    is_training = True

    def __init__(self, parent: object, kind: str) -> None:
        self.parent = parent
        self.kind = kind

    def get_config(self) -> OmniMoeConfig:
        return declaration(self.kind, hidden_size=self.hidden_size)

    def prepare_config_and_inputs_for_common(self) -> tuple[OmniMoeConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        shape = (self.batch_size, self.seq_length)
        # the last ids are no padding, and no end of a document
        ids = torch.randint(3, config.vocab_size, shape, device=torch_device)
        # the modalities too, since the suite goes on with the embeddings of the ids
        modalities = config.modality_of_ids().to(torch_device)[ids]
        return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril(), "modality_ids": modalities}
