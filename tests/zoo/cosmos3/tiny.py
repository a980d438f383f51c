"""Cosmos3 at a tiny size, scenes of every kind, and the reference implementations over one published folder."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from omnimoe.model import OmniMoeForCausalLM
from omnimoe.zoo.cosmos3.convert import COSMOS3, ROOT, TRANSFORMER
from omnimoe.zoo.cosmos3.layout import Scene, lay_out, to_latent, to_rows

TRANSFORMER_OF = {
    "cosmos3_omni": {
        "_class_name": "Cosmos3OmniTransformer",
        "action_dim": 5,
        "action_gen": True,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 48,
        "intermediate_size": 56,
        "latent_channel": 3,
        "latent_patch_size": 2,
        "num_attention_heads": 4,  # heads wider together than the model, as in Super
        "num_embodiment_domains": 3,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "patch_latent_dim": 12,
        "qk_norm_for_text": True,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
        "rope_theta": 5_000_000,
        "sound_dim": 6,
        "sound_gen": True,
        "timestep_scale": 0.001,
        "vocab_size": 120,
    }
}
TRANSFORMER_OF["cosmos3_edge"] = {
    **TRANSFORMER_OF["cosmos3_omni"],
    "hidden_act": "relu2",
    "qk_norm_for_text": False,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"mrope_section": [4, 2, 2]},
    "sound_dim": None,
    "sound_gen": False,
    "use_und_k_norm_for_gen": True,
}
_TOKENS = {"image_token_id": 100, "video_token_id": 101, "vision_start_token_id": 102, "vision_end_token_id": 103}
ROOT_OF: dict[str, dict[str, Any]] = {
    "cosmos3_omni": {
        "model_type": "cosmos3_omni",
        **_TOKENS,
        "text_config": {"bos_token_id": 1, "eos_token_id": 2},
        "vision_config": {
            "deepstack_visual_indexes": [0, 1],
            "depth": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": 48,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
    "cosmos3_edge": {
        "model_type": "cosmos3_edge",
        **_TOKENS,
        "projector_config": {"merger_intermediate_size": 36},
        "text_config": {"bos_token_id": 1, "eos_token_id": 2},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_patches": 16,
            "patch_size": 4,
            "spatial_merge_size": 2,
        },
    },
}
KINDS = tuple(ROOT_OF)


def make_model(kind: str, seed: int = 0, std: float = 0.15) -> OmniMoeForCausalLM:
    """Ours, every number of it random."""
    torch.manual_seed(seed)
    made = OmniMoeForCausalLM(COSMOS3.config_of({ROOT: ROOT_OF[kind], TRANSFORMER: TRANSFORMER_OF[kind]})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * (std if parameter.ndim > 1 else 0.1))
    return made


def held_in(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The published tensors of the transformer and of the vision tower."""
    return (
        load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"),
        load_file(folder / "vision_encoder" / "model.safetensors"),
    )


def generator(kind: str, folder: Path) -> Any:
    """diffusers' transformer, both towers of it."""
    from diffusers import Cosmos3OmniTransformer

    fields = {name: value for name, value in TRANSFORMER_OF[kind].items() if name != "_class_name"}
    peer = Cosmos3OmniTransformer(**fields)
    peer.load_state_dict(held_in(folder)[0], strict=True)
    return peer.eval()


def reasoner(kind: str, folder: Path) -> Any:
    """transformers' model, which reads the first tower and the vision tower."""
    from transformers import AutoModelForImageTextToText
    from transformers.models.cosmos3_edge.configuration_cosmos3_edge import Cosmos3EdgeConfig
    from transformers.models.cosmos3_omni.configuration_cosmos3_omni import Cosmos3OmniConfig

    plain, root = TRANSFORMER_OF[kind], ROOT_OF[kind]
    text = {name: plain[name] for name in ("hidden_size", "intermediate_size", "head_dim", "vocab_size")}
    text |= {name: plain[name] for name in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers")}
    text |= {"rms_norm_eps": plain["rms_norm_eps"], "max_position_embeddings": 512, "pad_token_id": 0}
    rope = {"rope_type": "default", "rope_theta": float(plain["rope_theta"])}
    rope["mrope_section"] = plain["rope_scaling"]["mrope_section"]
    text |= {"rope_parameters": rope}
    if kind == "cosmos3_omni":
        config = Cosmos3OmniConfig(
            text_config={"model_type": "qwen3_vl_text", **text},
            vision_config={"model_type": "qwen3_vl_vision", **root["vision_config"]},
            **_TOKENS,
        )
    else:
        config = Cosmos3EdgeConfig(
            text_config=text, vision_config=root["vision_config"], projector_hidden_size=36, **_TOKENS
        )
    peer = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    own = peer.state_dict()
    language, vision = held_in(folder)
    named = {name if kind == "cosmos3_edge" else f"model.visual.{name}": held for name, held in vision.items()}
    for name, held in language.items():
        for site in ("q", "k", "v"):
            name = name.replace(f"self_attn.to_{site}.", f"self_attn.{site}_proj.")
            name = name.replace(f"self_attn.norm_{site}.", f"self_attn.{site}_norm.")
        name = name.replace("self_attn.to_out.", "self_attn.o_proj.")
        if kind == "cosmos3_edge":
            name = re.sub(r"\.mlp\.up_proj", ".mlp.fc1", re.sub(r"\.mlp\.down_proj", ".mlp.fc2", name))
        name = name if name.startswith("lm_head") else f"model.language_model.{name}"
        if name in own:
            named[name] = held
    peer.load_state_dict(named, strict=True)
    return peer.eval()


@dataclass
class Sample:
    """A scene and what stands in it.

    Args:
        scene: its layout.
        pictures: patches and grids of pictures that are seen.
        latent: ``(C, T, H, W)`` of the clip, its noisy pictures with noise.
        noisy: latent pictures that carry noise.
        sound: ``(n, C)``.
        action: ``(n, C)``.
        domain: of the machine.
        acted: steps of the machine that are given, without noise.
        time: of all that carries noise.
    """

    scene: Scene
    pictures: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    latent: Tensor | None = None
    noisy: list[int] = field(default_factory=list)
    sound: Tensor | None = None
    action: Tensor | None = None
    domain: int = 0
    acted: int = 0
    time: float = 0.5


def samples(kind: str, seed: int = 0) -> list[Sample]:
    """Words alone; a still; a clip with given pictures at another rate; sound; actions, all of them given or none."""
    draw = torch.Generator().manual_seed(seed)
    has_sound = kind == "cosmos3_omni"

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    def seen(tall: int, wide: int) -> tuple[Tensor, Tensor]:
        frames = 2 if has_sound else 1
        return made(tall * wide, 3 * 16 * frames), torch.tensor([1, tall, wide])

    def words(*parts: int | tuple[Tensor, Tensor]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids += torch.randint(3, 90, (part,), generator=draw).tolist()
            else:
                ids += [102, *[100] * (int(part[1].prod()) // 4), 103]
        return ids

    first, second, third = seen(4, 6), seen(2, 2), seen(6, 4)
    found = [
        Sample(Scene(ids=words(7))),
        Sample(
            Scene(ids=words(3, first, 2, second, 4), seen=[(1, 2, 3), (1, 1, 1)], video=(1, 2, 3)),
            pictures=[first, second],
            latent=made(3, 1, 4, 6),
            noisy=[0],
            time=1.0,
        ),
        Sample(
            Scene(ids=words(5), video=(3, 2, 2), fps=16.0, sound=4 if has_sound else 0),
            latent=made(3, 3, 3, 4),  # an odd side is filled up
            noisy=[1, 2],
            sound=made(4, 6) if has_sound else None,
            time=0.7,
        ),
        Sample(Scene(ids=words(third, 3), seen=[(1, 3, 2)]), pictures=[third]),
        Sample(
            Scene(ids=words(2), video=(2, 1, 2), action=3, fps=10.0, sound=2 if has_sound else 0),
            latent=made(3, 2, 2, 4),
            noisy=[1],
            sound=made(2, 6) if has_sound else None,
            action=made(3, 5),
            domain=2,
            time=0.3,
        ),
        Sample(
            Scene(ids=words(4), video=(2, 1, 1), action=3),
            latent=made(3, 2, 2, 2),
            noisy=[1],
            action=made(3, 5),
            domain=1,
            acted=3,
            time=0.9,
        ),
    ]
    return found


def batch(model: OmniMoeForCausalLM, held: list[Sample], side: str = "left") -> dict[str, Any]:
    """What ``model`` takes for samples, padded on one side."""
    given: dict[str, Any] = lay_out(model.config, [sample.scene for sample in held])
    if side == "right":
        ahead = (1 - given["attention_mask"]).sum(1).tolist()
        for name, column in given.items():
            given[name] = torch.stack([row.roll(-gap, 0) for row, gap in zip(column, ahead, strict=True)])
    features: dict[str, Any] = {}
    times: dict[str, Tensor] = {}
    pictures = [picture for sample in held for picture in sample.pictures]
    if pictures:
        encoder = model.model.modalities["vision"].get_encoder()
        features["vision"] = encoder.pad(*(torch.cat([p[0] for p in pictures]), torch.stack([p[1] for p in pictures])))
    clips = [sample for sample in held if sample.latent is not None]
    if clips:
        rows = [to_rows(sample.latent) for sample in clips]
        features["video"] = torch.cat([part.flatten(0, 2) for part in rows])
        times["video"] = torch.cat(
            [
                torch.tensor([sample.time if frame in sample.noisy else 0.0 for frame in range(len(part))])
                .view(-1, 1, 1)
                .expand(part.shape[:3])
                .flatten()
                for sample, part in zip(clips, rows, strict=True)
            ]
        )
    sounds = [sample for sample in held if sample.sound is not None]
    if sounds:
        features["sound"] = torch.cat([sample.sound for sample in sounds])
        times["sound"] = torch.cat([torch.full((len(sample.sound),), sample.time) for sample in sounds])
    acts = [sample for sample in held if sample.action is not None]
    if acts:
        domains = torch.tensor([sample.domain for sample in acts])
        features["action"] = {"rows": torch.stack([sample.action for sample in acts]), "domains": domains}
        times["action"] = torch.cat(
            [
                torch.tensor([0.0] * sample.acted + [sample.time] * (len(sample.action) - sample.acted))
                for sample in acts
            ]
        )
    return {**given, "features": features, "timesteps": times} if features else given


def asked(sample: Sample) -> dict[str, Any]:
    """A sample as diffusers' transformer takes it, laid out by its pipeline's own functions."""
    from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import (
        get_3d_mrope_ids_text_tokens,
        get_3d_mrope_ids_vae_tokens,
    )

    scene, at = sample.scene, len(sample.scene.ids)
    places, after = get_3d_mrope_ids_text_tokens(at, 0, use_float_positions=True)
    start = after + 15_000
    given: dict[str, Any] = {
        "input_ids": torch.tensor(scene.ids),
        "text_indexes": torch.arange(at),
        "und_len": at,
        "vision_tokens": [sample.latent.unsqueeze(0)],
    }
    spans = [places]
    counts = {"vision": scene.video, "sound": (scene.sound, 1, 1), "action": (scene.action, 1, 1)}
    rates = {
        "vision": {"fps": scene.fps, "temporal_compression_factor": 4},
        "sound": {"fps": scene.sound_fps, "temporal_compression_factor": 1},
        "action": {
            "fps": scene.fps,
            "temporal_compression_factor": 1,
            "base_temporal_compression_factor": 4,
            "start_frame_offset": 1,
        },
    }
    noisy = {
        "vision": sample.noisy,
        "sound": list(range(scene.sound)),
        "action": list(range(sample.acted, scene.action)),
    }
    for name, shape in counts.items():
        if not shape[0]:
            continue
        ids, _ = get_3d_mrope_ids_vae_tokens(*shape, temporal_offset=start, base_fps=24.0, **rates[name])
        spans.append(ids.float())
        frame = shape[1] * shape[2]
        given[f"{name}_token_shapes"] = [shape]
        given[f"{name}_sequence_indexes"] = torch.arange(at, at + shape[0] * frame)
        scored = list(itertools.chain(*(range(at + i * frame, at + (i + 1) * frame) for i in noisy[name])))
        given[f"{name}_mse_loss_indexes"] = torch.tensor(scored, dtype=torch.int64)
        given[f"{name}_timesteps"] = torch.full((len(scored),), 1000 * sample.time)
        given[f"{name}_noisy_frame_indexes"] = [torch.tensor(noisy[name], dtype=torch.int64)]
        at += shape[0] * frame
    if scene.sound:
        given["sound_tokens"] = [sample.sound.T]
    if scene.action:
        given["action_tokens"] = [sample.action]
        given["action_domain_ids"] = [torch.tensor([sample.domain])]
    return {**given, "position_ids": torch.cat(spans, dim=1), "sequence_length": at}


__all__ = [
    "KINDS",
    "ROOT_OF",
    "TRANSFORMER_OF",
    "Sample",
    "Scene",
    "asked",
    "batch",
    "generator",
    "make_model",
    "reasoner",
    "samples",
    "to_latent",
]
