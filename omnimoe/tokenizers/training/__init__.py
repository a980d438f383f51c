"""The commands that made the shipped weights; one module a tokenizer, run with ``python -m``."""
