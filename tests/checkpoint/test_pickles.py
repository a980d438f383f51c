"""Pickles, by their own name or another, and distributed checkpoints, which hold one: none is opened unasked."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from omnimoe import from_pretrained
from omnimoe.model import OmniMoeForCausalLM
from tests.checkpoint.files import INDEX, WEIGHTS, load, same_weights
from tests.checkpoint.test_mutations import mutated, outcomes
from tests.children import capped
from tests.refusals import refused, unchanged

MEMORY = 512 << 20
"""Bytes that a child may take which reads or refuses a pickle."""


class Trap:
    """Leaves a folder behind where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (str(self.canary),))


def trapped(canary: Path, weights: dict | None = None) -> bytes:
    buffer = io.BytesIO()
    torch.save({**(weights or {}), "model.norm.weight": Trap(canary)}, buffer)
    return buffer.getvalue()


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "code of a checkpoint ran"


@pytest.mark.hazard(3)
@pytest.mark.parametrize("by", [load, from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
@capped(MEMORY)
def test_a_pickle_is_not_opened(saved, canary, name, by):
    (saved / WEIGHTS).unlink()
    (saved / name).write_bytes(trapped(canary))
    with refused(saved, f"has no model.safetensors, only {name}, which can run code"):
        by(saved)


@pytest.mark.hazard(3)
@capped(MEMORY)
def test_asking_for_it_takes_two_words(saved, canary):
    (saved / "pytorch_model.bin").write_bytes(trapped(canary))
    with refused(saved, "pass allow_pickle=True too"):
        load(saved, use_safetensors=False)


@pytest.mark.hazard(3)
@capped(MEMORY)
def test_a_pickle_that_is_allowed_still_runs_no_code(saved, canary):
    (saved / WEIGHTS).unlink()
    (saved / "pytorch_model.bin").write_bytes(trapped(canary))
    for by in (load, from_pretrained):
        with refused(saved, "is not opened: it names posix.mkdir, which is no part of weights and can run code"):
            by(saved, allow_pickle=True)


def with_head(head: torch.Tensor):
    return lambda weights: weights | {"lm_head.weight": head}


@pytest.mark.hazard(3)
@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda weights: weights | {"extra": torch.ones(1)}, "1 unexpected:\n  extra"),
        (lambda weights: weights | {"extra": 1}, "holds something else than weights by name"),
        (lambda weights: list(weights.values()), "holds something else than weights by name"),
        (with_head(torch.ones(3, 3)), "lm_head.weight: (3, 3) in the file, (40, 16) in the model"),
        (with_head(torch.ones(40, 16, dtype=torch.int64)), "lm_head.weight: int64 in the file, float32 in the model"),
        (lambda weights: {name: weights[name] for name in weights if "norm" not in name}, "missing:\n  model.backbone"),
        (b"", "cannot be read as a pickle of weights: EOFError"),
        (b"hello", "cannot be read as a pickle of weights"),
        (slice(None, -100), "cannot be read as a pickle of weights"),
        (slice(None, 2000), "cannot be read as a pickle of weights"),
    ],
)
@capped(MEMORY)
def test_a_pickle_that_is_allowed_is_held_to_what_safetensors_are(saved, model, change, fragment):
    (saved / WEIGHTS).unlink()
    path = saved / "pytorch_model.bin"
    torch.save(change(model.state_dict()) if callable(change) else model.state_dict(), path)
    if not callable(change):
        path.write_bytes(path.read_bytes()[change] if isinstance(change, slice) else change)
    for by in (load, from_pretrained):
        with refused(saved, fragment):
            by(saved, allow_pickle=True)


@pytest.mark.hazard(3)
@capped(MEMORY)
def test_pickles_in_shards(saved, model):
    (saved / WEIGHTS).unlink()
    weights = model.state_dict()
    names = [*weights]
    shards = {"pytorch_model-1.bin": names[:9], "pytorch_model-2.bin": names[9:]}
    for file, held in shards.items():
        torch.save({name: weights[name] for name in held}, saved / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (saved / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same_weights(load(saved, allow_pickle=True), model)
    torch.save(weights, saved / "pytorch_model.bin")
    with refused(saved, "holds both pytorch_model.bin and pytorch_model.bin.index.json"):
        load(saved, allow_pickle=True)
    (saved / "pytorch_model.bin").unlink()
    torch.save({}, saved / "pytorch_model-2.bin")
    with refused(saved, f"pytorch_model-2.bin has no {sorted(names[9:])[0]}, where the index looks for"):
        load(saved, allow_pickle=True)
    (saved / "pytorch_model-2.bin").unlink()
    with refused(saved, "pytorch_model-2.bin is missing; fetch or copy it again"):
        load(saved, allow_pickle=True)


def test_changed_bytes_of_a_pickle(saved, model, canary):
    """What is allowed is read or refused as safetensors are, whatever bytes it has."""
    (saved / WEIGHTS).unlink()
    torch.save(model.state_dict(), saved / "pytorch_model.bin")
    content = (saved / "pytorch_model.bin").read_bytes()
    changes = [mutated(content, random.Random(seed), header=4000) for seed in range(40)]
    shapes = {name: held.shape for name, held in model.state_dict().items()}

    def check(loaded: OmniMoeForCausalLM) -> None:
        assert {name: held.shape for name, held in loaded.state_dict().items()} == shapes

    found = outcomes(
        saved,
        "pytorch_model.bin",
        changes,
        check,
        by=lambda folder: load(folder, allow_pickle=True, check_finite="off"),
    )
    assert found.total() == len(changes)
    assert found["refused"] > len(changes) // 4


@pytest.mark.hazard(3)
@capped(MEMORY)
def test_a_pickle_that_is_allowed_and_harmless(saved, model):
    (saved / WEIGHTS).unlink()
    torch.save(model.state_dict(), saved / "pytorch_model.bin")
    with unchanged(saved):
        loaded = load(saved, allow_pickle=True)
    assert same_weights(loaded, model)


@pytest.mark.hazard(3)
@capped(MEMORY)
def test_safetensors_win_over_a_pickle(saved, model, canary):
    (saved / "pytorch_model.bin").write_bytes(trapped(canary))
    with unchanged(saved):
        loaded = load(saved, allow_pickle=True)
    assert same_weights(loaded, model)


@pytest.mark.hazard(3)
@pytest.mark.parametrize("shard", ["../pytorch_model.bin", "/pytorch_model.bin", "model.sh"])
@capped(MEMORY)
def test_the_index_of_pickles_stays_in_its_folder(saved, canary, shard):
    (saved / WEIGHTS).unlink()
    (saved.parent / "pytorch_model.bin").write_bytes(trapped(canary))
    (saved / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with refused(saved, "a shard is a .bin file in the same folder"):
        load(saved, allow_pickle=True)


def zipped(canary: Path) -> bytes:
    return trapped(canary)


def tarred(canary: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("data.pkl"), io.BytesIO())
    return buffer.getvalue()


@pytest.mark.hazard(4)
@pytest.mark.parametrize("kind", ["one file", "shard"])
@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (zipped, "it seems to be a zip archive, as torch.save writes: a pickle, which can run code"),
        (lambda canary: pickle.dumps(Trap(canary), protocol=2), "it seems to be a pickle, which can run code"),
        (lambda canary: pickle.dumps(Trap(canary)), "it seems to be a pickle, which can run code"),
        (lambda canary: gzip.compress(trapped(canary)), "it seems to be packed with gzip"),
        (tarred, "it seems to be a tar archive"),
    ],
    ids=["zip", "pickle_2", "pickle_4", "gzip", "tar"],
)
@capped(MEMORY)
def test_a_pickle_by_another_name_is_told(saved, sharded, canary, content, fragment, kind):
    folder, name = saved, WEIGHTS
    if kind == "shard":
        folder, name = sharded, min(json.loads((sharded / INDEX).read_text())["weight_map"].values())
    (folder / name).write_bytes(content(canary))
    with refused(folder, fragment):
        load(folder)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer, not the file it points at"),
        (b"<!DOCTYPE html><html>404</html>", "an HTML page, as a server sends"),
        (b'{"error": "not found"}', "a text in JSON, as a server sends"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "an XML page"),
        (b"GGUF\x03\0\0\0" + bytes(99), "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    ],
)
def test_what_else_is_fetched_in_place_of_weights(saved, content, fragment):
    (saved / WEIGHTS).write_bytes(content)
    with refused(saved, fragment):
        load(saved)


@pytest.mark.hazard(28)
@pytest.mark.parametrize("by", [load, from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("is_alone", [True, False])
@capped(MEMORY)
def test_a_distributed_checkpoint_is_refused(saved, canary, by, is_alone):
    """Its .metadata is a pickle that PyTorch opens with the power to run code."""
    if is_alone:
        (saved / WEIGHTS).unlink()
    (saved / ".metadata").write_bytes(pickle.dumps(Trap(canary)))
    (saved / "__0_0.distcp").write_bytes(trapped(canary))
    with refused(saved, "is a distributed checkpoint of PyTorch, whose .metadata can run code; resume the run"):
        by(saved)


@pytest.mark.hazard(28)
@capped(MEMORY)
def test_a_real_distributed_checkpoint(model, tmp_path):
    from torch.distributed import checkpoint as dcp

    folder = tmp_path / "run"
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder, no_dist=True)
    model.config.save_pretrained(folder)
    with refused(folder, "is a distributed checkpoint of PyTorch"):
        load(folder)
