"""Tied weights and shared storage: one matrix before and after, whatever happens in between."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from omnimoe import from_pretrained
from tests.checkpoint.files import WEIGHTS, edit, load, same_weights, small
from tests.declarations import build, ids_like
from tests.refusals import refused, unchanged

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def tied():
    return build(small("dense_tied"))


@pytest.fixture
def folder(tied, tmp_path):
    tied.save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def is_tied(model) -> bool:
    return model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.hazard(32)
def test_they_are_saved_once(tied, folder):
    with unchanged(tied):
        tied.save_pretrained(folder)
    held = load_file(folder / WEIGHTS)
    assert (HEAD in held) + (TABLE in held) == 1
    assert is_tied(tied)


@pytest.mark.hazard(32)
@pytest.mark.parametrize("by", [load, from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_they_are_tied_after_loading(tied, folder, by):
    with unchanged(folder, tied):
        loaded = by(folder)
    assert is_tied(loaded)
    assert same_weights(loaded, tied)


@pytest.mark.hazard(32)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_they_are_tied_in_another_dtype(folder, dtype):
    with unchanged(folder):
        assert is_tied(load(folder, dtype=dtype))
        assert is_tied(load(folder).to(dtype))


@pytest.mark.hazard(32)
def test_they_are_tied_in_shards(tied, tmp_path):
    with unchanged(tied):
        tied.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load(tmp_path, verify=True)
    assert is_tied(loaded)
    assert same_weights(loaded, tied)


@pytest.mark.hazard(32)
@pytest.mark.parametrize("name", [HEAD, TABLE])
def test_either_of_the_two_is_enough(tied, folder, name):
    """Other programs keep the other one, or both."""
    matrix = tied.lm_head.weight.detach().clone()

    def change(weights):
        weights.pop(HEAD, None)
        weights.pop(TABLE, None)
        weights[name] = matrix

    edit(folder, change)
    # transformers draws the one that is not there before it ties it
    with unchanged(folder, draws=True):
        loaded = load(folder)
    assert is_tied(loaded)
    assert same_weights(loaded, tied)


@pytest.mark.hazard(32)
def test_neither_of_the_two_is_not(folder):
    edit(folder, lambda weights: [weights.pop(name, None) for name in (HEAD, TABLE)])
    with refused(folder, "2 missing:"):
        load(folder)


@pytest.mark.hazard(32)
def test_both_of_them(tied, folder):
    matrix = tied.lm_head.weight.detach()
    edit(folder, lambda weights: weights.update({HEAD: matrix.clone(), TABLE: matrix.clone()}))
    with unchanged(folder, tied):
        loaded = load(folder)
    assert is_tied(loaded)
    assert same_weights(loaded, tied)


@pytest.mark.hazard(32)
def test_a_step_moves_both(folder):
    model = load(folder)
    ids = ids_like(model.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert is_tied(model)
    with unchanged(model):
        model.save_pretrained(folder)
    assert same_weights(load(folder), model)


@pytest.mark.hazard(32)
def test_shared_storage_that_is_not_tied_is_saved_apart(tmp_path):
    """Two parameters that somebody laid into one tensor are two weights in the file, with what each of them says."""
    model = build(small("dense"))
    matrix = torch.randn(2, *model.lm_head.weight.shape)
    model.lm_head.weight.data, model.model.embed_tokens.weight.data = matrix[0], matrix[1]
    with unchanged(model):
        model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert not is_tied(loaded)
    assert torch.equal(loaded.lm_head.weight, matrix[0])
    assert torch.equal(loaded.model.embed_tokens.weight, matrix[1])


@pytest.mark.hazard(32)
def test_a_copy_and_a_state_dict_of_the_callers(tied, tmp_path):
    twin = copy.deepcopy(tied)
    assert is_tied(twin)
    assert twin.lm_head.weight.data_ptr() != tied.lm_head.weight.data_ptr()
    with unchanged(twin, tied):
        twin.save_pretrained(tmp_path, state_dict={name: tensor + 1 for name, tensor in tied.state_dict().items()})
    assert torch.equal(load(tmp_path).lm_head.weight, tied.lm_head.weight + 1)
