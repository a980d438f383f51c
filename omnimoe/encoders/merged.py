"""Vision towers that merge squares of patches and give rows as wide as the model: Qwen3-VL's and Cosmos3 Edge's.

Pictures keep their shape. The towers are transformers', with the merger behind them; their weights come with the model
that they are a part of, and alone they are untrained. Qwen3-VL's gives several rows for a square: one that enters the
model, and one of each of some layers, for the first layers of the model (DeepStack). They lie side by side.

Source: DeepStack, https://arxiv.org/abs/2406.04334; Qwen3-VL, https://arxiv.org/abs/2511.21631.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.encoders.base import Encoder, EncoderError, Features, register_encoder
from omnimoe.encoders.raw import whole_pictures
from omnimoe.encoders.tower import TowerConfig


class Merged(Encoder):
    """What both have in common: patches of pictures in, one row for each square of them out."""

    kind = "image"

    @dataclass(frozen=True, kw_only=True)
    class Config(TowerConfig):
        """A tower and its merger."""

        patch_size: int = 16
        """Side of a patch in pixels."""
        merge_size: int = 2
        """Patches along a side of a square that becomes one row."""
        num_places: int = 2304
        """Places of the square grid that positions were learned for."""
        out_size: int = 4096
        """Width of the rows that come out: that of the model."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.check_positive("merge_size", "out_size")
            if round(self.num_places**0.5) ** 2 != self.num_places:
                raise ConfigError(f"num_places must be those of a square grid, got {self.num_places}")

        @property
        def depth(self) -> int:
            """Rows of a square that enter later layers of the model."""
            return 0

    config: Merged.Config

    def __init__(self, config: Merged.Config) -> None:
        super().__init__(config)
        self.hidden_size = config.out_size * (1 + config.depth)

    def prepare(self, raws: Sequence[Any], **options: Any) -> dict[str, Tensor]:
        """Pictures to patches, as the processor of the published model makes them.

        Args:
            raws: B paths, PIL images, or uint8 arrays or tensors ``(H, W, 3)``.
            options: of the processor of transformers: ``size={"shortest_edge": pixels, "longest_edge": pixels}``.

        Returns:
            ``patches (B, n, K)``, ``grids (B, 3)`` int64, patches along time, height and width; ``mask (B, n)`` bool,
            False at padding.

        Raises:
            EncoderError: if one is not a picture.
        """
        given = self._processor()(images=whole_pictures(raws), return_tensors="pt", **options)
        return self.pad(given["pixel_values"], given["image_grid_thw"])

    def pad(self, patches: Tensor, grids: Tensor) -> dict[str, Tensor]:
        """Patches of pictures or clips one after the other, as processors of transformers give them, to one batch.

        Args:
            patches: ``(n, K)``.
            grids: ``(B, 3)``, patches of each along time, height and width.
        """
        counts = grids.prod(-1).tolist()
        if patches.ndim != 2 or sum(counts) != len(patches):
            raise EncoderError(f"grids tell of {sum(counts)} patches, got {tuple(patches.shape)}; pass (n, K)")
        mask = torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)
        padded = patches.new_zeros(*mask.shape, patches.shape[1])
        padded[mask] = patches
        return {"patches": padded, "grids": grids, "mask": mask}

    def shapes(self, inputs: Mapping[str, Tensor]) -> list[tuple[int, int, int]]:
        """Rows along time, height and width of each picture or clip of what :meth:`prepare` gives."""
        side = self.config.merge_size
        return [(time, tall // side, wide // side) for time, tall, wide in inputs["grids"].tolist()]

    def forward(self, inputs: Mapping[str, Tensor]) -> Features:
        """Patches to rows ``(B, m, C)``, C the width of the model times one and the depth; pooled is their mean."""
        mask, grids = inputs["mask"].to(self.device), inputs["grids"].to(self.device)
        rows = self._rows(inputs["patches"].to(self.device, self.dtype)[mask], grids)
        counts = (grids.prod(-1) // self.config.merge_size**2).tolist()
        longest = max(counts)
        parts = [F.pad(part, (0, 0, 0, longest - len(part))) for part in rows.split(counts)]
        held = torch.arange(longest, device=rows.device) < torch.tensor(counts, device=rows.device).unsqueeze(1)
        pooled = torch.stack([part.mean(0) for part in rows.split(counts)])
        shapes = torch.tensor(self.shapes(inputs))
        return Features(
            rows=torch.stack(parts), pooled=pooled, mask=None if min(counts) == longest else held, shapes=shapes
        )

    def _processor(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not define _processor()")

    def _rows(self, patches: Tensor, grids: Tensor) -> Tensor:
        """``(n, K)`` to ``(m, C)``, picture after picture."""
        raise NotImplementedError(f"{type(self).__name__} does not define _rows(patches, grids)")


@register_encoder("qwen3_vl")
class Qwen3VL(Merged):
    """Qwen3-VL's tower, over two frames a patch."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Merged.Config):
        """Qwen3-VL's tower; the defaults are those of the 8B model."""

        temporal_size: int = 2
        """Frames of a patch; a picture stands for all of them."""
        deep_layers: tuple[int, ...] = (8, 16, 24)
        """Layers of the tower after which rows are taken for the first layers of the model."""

        @property
        def depth(self) -> int:
            return len(self.deep_layers)

    config: Qwen3VL.Config

    def __init__(self, config: Qwen3VL.Config, *, weights: bool = True) -> None:
        from transformers import Qwen3VLVisionConfig, Qwen3VLVisionModel

        super().__init__(config)
        form = Qwen3VLVisionConfig(
            depth=config.num_layers,
            hidden_size=config.hidden_size,
            hidden_act=config.activation,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_heads,
            patch_size=config.patch_size,
            spatial_merge_size=config.merge_size,
            temporal_patch_size=config.temporal_size,
            out_hidden_size=config.out_size,
            num_position_embeddings=config.num_places,
            deepstack_visual_indexes=list(config.deep_layers),
            attn_implementation="sdpa",
        )
        self.network = Qwen3VLVisionModel(form)

    def _processor(self) -> Any:
        from transformers import Qwen2VLImageProcessor

        return Qwen2VLImageProcessor(
            patch_size=self.config.patch_size,
            temporal_patch_size=self.config.temporal_size,
            merge_size=self.config.merge_size,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            size={"shortest_edge": 256**2, "longest_edge": 4096**2},
        )

    def _rows(self, patches: Tensor, grids: Tensor) -> Tensor:
        out = self.network(patches, grid_thw=grids)
        return torch.cat((out.pooler_output, *out.deepstack_features), dim=1)


@register_encoder("cosmos3_edge")
class Cosmos3Edge(Merged):
    """A SigLIP 2 tower over pictures of any shape and the projector behind it, as Cosmos3 Edge has them."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Merged.Config):
        """Cosmos3 Edge's tower and projector."""

        num_places: int = 256
        """As above; the grid is scaled to the shape of a picture."""
        out_size: int = 2048
        """As above."""
        merger_size: int = 11_520
        """Width between the matrices of the projector."""
        eps: float = 1e-6
        """Added to the variance in the norms of the tower."""

    config: Cosmos3Edge.Config

    def __init__(self, config: Cosmos3Edge.Config, *, weights: bool = True) -> None:
        from transformers.models.cosmos3_edge import modeling_cosmos3_edge as edge
        from transformers.models.cosmos3_edge.configuration_cosmos3_edge import Cosmos3EdgeConfig

        super().__init__(config)
        form = Cosmos3EdgeConfig(
            vision_config={
                "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "num_patches": config.num_places,
                "patch_size": config.patch_size,
                "spatial_merge_size": config.merge_size,
                "layer_norm_eps": config.eps,
                "hidden_act": config.activation,
            },
            text_config={"hidden_size": config.out_size, "num_attention_heads": 1, "num_key_value_heads": 1},
            projector_hidden_size=config.merger_size,
        )
        form.vision_config._attn_implementation = "sdpa"
        self.visual: nn.Module = edge.Cosmos3EdgeVisionModel(form.vision_config)
        self.projector: nn.Module = edge.Cosmos3EdgePatchMerger(form)

    def _processor(self) -> Any:
        from transformers import Cosmos3EdgeImageProcessor

        return Cosmos3EdgeImageProcessor(patch_size=self.config.patch_size, merge_size=self.config.merge_size)

    def _rows(self, patches: Tensor, grids: Tensor) -> Tensor:
        return self.projector(self.visual(patches, grid_thw=grids, return_dict=True).last_hidden_state)


__all__ = ["Cosmos3Edge", "Merged", "Qwen3VL"]
