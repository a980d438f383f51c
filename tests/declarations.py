"""Tiny models for the tests: one declaration of each kind, and batches that exercise what can go wrong."""

from __future__ import annotations

import copy

import torch

from omnimoe.backbone import LayerRange
from omnimoe.experts import FeedForward, RoutedAttention, RoutedExperts
from omnimoe.layers import Attention, Norm
from omnimoe.modalities import Patches, Tokens
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.routers import ByModalityRouter, ExpertChoiceRouter, StaticRouter, TopKRouter

TEXT = Tokens.Config(name="text", vocab_size=20)
IMAGE = Tokens.Config(name="image", vocab_size=12, begin_id=3, end_id=4, num_tokens=4)
SPEECH = Tokens.Config(name="speech", vocab_size=8, begin_id=5, end_id=6)
PATCHES = Patches.Config(name="latent", channels=6, objective="flow", placeholder_id=7)

DENSE = OmniMoeConfig(
    hidden_size=16,
    num_layers=2,
    modalities=(TEXT, IMAGE, SPEECH),
    attention=Attention.Config(num_heads=4, num_kv_heads=2),
    experts=FeedForward.Config(intermediate_size=24),
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def with_towers(config: OmniMoeConfig, towers, **changes) -> OmniMoeConfig:
    """The same model with one tower map at every site."""
    return config.replace(
        attention=config.attention.replace(towers=towers),
        experts=config.experts.replace(towers=towers),
        norm=config.norm.replace(towers=towers),
        final_norm=config.final_norm.replace(towers=towers),
        **changes,
    )


def routed(num_experts: int, router, **changes) -> RoutedExperts.Config:
    return RoutedExperts.Config(num_experts=num_experts, intermediate_size=24, router=router, **changes)


MOT = with_towers(DENSE, "modality")
MERGED = DENSE.replace(
    attention=DENSE.attention.replace(
        towers=(0, 1, 0), site_towers={"v_proj": "shared", "qk_norm": (1, 0, 0)}, qk_norm="rms"
    ),
    experts=DENSE.experts.replace(towers=(1, 0, 1)),
    norm=Norm.Config(towers=(0, 1, 1)),
)

DECLARATIONS: dict[str, OmniMoeConfig] = {
    "dense": DENSE,
    "dense_tied": DENSE.replace(tie_word_embeddings=True),
    "mot": MOT,
    "mot_post": MOT.replace(norm_placement="post", attention=MOT.attention.replace(qk_norm="rms", bias=True)),
    "merged": MERGED,
    "chameleon": MOT.replace(
        norm_placement="post", attention=MOT.attention.replace(qk_norm="layer", bias=True, output_bias=True)
    ),
    "moe": DENSE.replace(experts=routed(4, TopKRouter.Config(), num_shared_experts=1)),
    "moe_sigmoid": DENSE.replace(experts=routed(4, TopKRouter.Config(score="sigmoid", z_loss_coef=0.1))),
    "static": DENSE.replace(experts=routed(3, StaticRouter.Config())),
    "moma": DENSE.replace(experts=routed(6, ByModalityRouter.Config(experts=(2, 3, 1)))),
    "moma_top_k": DENSE.replace(
        experts=routed(
            6, ByModalityRouter.Config(experts=(2, 3, 1), router=TopKRouter.Config(top_k=1, normalize=False))
        )
    ),
    "pools": DENSE.replace(
        experts=routed(
            8,
            ByModalityRouter.Config(experts=(2, 2, 4), router=TopKRouter.Config(top_k=2, expert_bias="shared")),
            pools=((2, 24), (2, 8), (4, 16)),
            num_shared_experts=1,
        )
    ),
    "expert_choice": DENSE.replace(experts=routed(4, ExpertChoiceRouter.Config(capacity_factor=1.5))),
    "mot_hybrid": MOT.replace(
        num_layers=3,
        layers=(LayerRange(start=1, step=2, experts=routed(4, TopKRouter.Config()), norm_placement="post"),),
    ),
    "attention_experts": DENSE.replace(
        attention=RoutedAttention.Config(
            num_heads=4,
            num_kv_heads=2,
            bias=True,
            output_bias=True,
            num_experts=6,
            router=ByModalityRouter.Config(experts=(2, 3, 1), router=TopKRouter.Config(top_k=2)),
        ),
        experts=routed(4, TopKRouter.Config()),
    ),
    "attention_heads": DENSE.replace(
        attention=RoutedAttention.Config(
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            qk_norm="rms",
            num_experts=4,
            own_heads=True,
            site_towers={"k_proj": "modality"},
        )
    ),
    "one_way": MOT.replace(mask="one_way"),
    "block_causal": MOT.replace(mask="block_causal", bidirectional_modalities=("image",)),
    "encoder": MOT.replace(mask="bidirectional"),
    "transfusion": with_towers(DENSE.replace(modalities=(TEXT, PATCHES)), "modality").replace(
        mask="block_causal", bidirectional_modalities=("latent",)
    ),
}
"""Every kind of model, by name."""

CAUSAL = [name for name, config in DECLARATIONS.items() if config.is_causal]
"""Those that declare that no position depends on a later one."""
CACHED = [name for name in CAUSAL if DECLARATIONS[name].mask == "causal"]
"""Those with cached decoding."""


def build(config: OmniMoeConfig, *, seed: int = 0) -> OmniMoeForCausalLM:
    """A model in evaluation mode whose every parameter is random, norms and biases too."""
    torch.manual_seed(seed)
    model = OmniMoeForCausalLM(copy.deepcopy(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias") or "out_proj" in name:
                parameter.normal_(std=0.3)
            elif ".auxiliary.outer" in name:
                parameter.normal_(std=2.0)  # it starts at zero, which says that it was never trained
        for router in model.modules():
            if isinstance(router, ExpertChoiceRouter):
                router.cutoff += 1e-6  # where it starts says the same
    return model.eval()


def ids_like(config: OmniMoeConfig, batch_size: int = 2, length: int = 12, *, seed: int = 0) -> torch.Tensor:
    """Random ids in runs of one modality, interleaved, all modalities present."""
    generator = torch.Generator().manual_seed(seed)
    ranges = list(config.token_ranges.values())
    ids = torch.zeros(batch_size, length, dtype=torch.int64)
    for row in range(batch_size):
        column, turn = 0, row
        while column < length:
            held = ranges[turn % len(ranges)]
            run = int(torch.randint(1, 4, (), generator=generator))
            first = held.start + (8 if held.name == "text" else 0)
            ids[row, column : column + run] = torch.randint(
                first, held.stop, (min(run, length - column),), generator=generator
            )
            column, turn = column + run, turn + 1
    return ids


def copy_weights(model, source, rename=lambda name: name, change=lambda name, value, like: value):
    """Loads one model's weights into another of a different declaration."""
    own = source.state_dict()
    state = {name: change(name, own[rename(name)], like) for name, like in model.state_dict().items()}
    model.load_state_dict(state)
    return model
