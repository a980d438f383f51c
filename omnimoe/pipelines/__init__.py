"""Published models from raw inputs to raw outputs: words and pictures in, words and pictures out."""

from omnimoe.pipelines.base import PIPELINES, Clip, Part, Pipeline, find_pipeline, register_pipeline

__all__ = ["PIPELINES", "Clip", "Part", "Pipeline", "find_pipeline", "register_pipeline"]
