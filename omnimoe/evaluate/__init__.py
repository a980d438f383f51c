"""Evaluation: losses, retrieval by likelihood, tokenizers, generated pictures and speech, of several models at once."""

from __future__ import annotations

from omnimoe.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "omnimoe.evaluate.base": ("METRICS", "EvaluationError", "Measure", "NotRunError", "register_metric"),
        "omnimoe.evaluate.bench": ("Bench",),
        "omnimoe.evaluate.likelihood": ("log_likelihoods",),
        "omnimoe.evaluate.raw": ("RawCorpus",),
        "omnimoe.evaluate.run": ("Evaluation", "evaluate"),
        "omnimoe.evaluate.statistics": (
            "frechet_distance",
            "kernel_distance",
            "psnr",
            "ssim",
            "wilson",
            "word_errors",
        ),
    },
)
