"""Discrete codes and the range of the vocabulary that they own."""

from __future__ import annotations

import torch

from omnimoe.modalities import TokenRange, Tokens


def test_the_loss_is_the_cross_entropy_of_each_row_and_ignored_rows_are_zero():
    tokens = Tokens.Config(name="text", vocab_size=5).build(hidden_size=4)
    logits, targets = torch.randn(3, 5), torch.tensor([2, -100, 4])
    found = tokens.loss(logits.bfloat16(), targets)
    wanted = -logits.bfloat16().float().log_softmax(-1)
    torch.testing.assert_close(found, torch.stack((wanted[0, 2], torch.zeros(()), wanted[2, 4])))
    assert found.dtype == torch.float32
    assert not list(tokens.parameters())


def test_a_range_ends_where_its_size_says():
    assert TokenRange(name="image", start=20, size=12).stop == 32
