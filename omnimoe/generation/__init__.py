"""What :mod:`omnimoe.generate` is made of: inputs, prompts, sampling, latents, ranking, and what is written of it."""

ANY = "any"
"""The target that lets the model choose, span by span."""
