"""Pickles, by their own name or another, and distributed checkpoints, which hold one: none is opened unasked."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from omnimoe import from_pretrained
from tests.checkpoint.files import INDEX, WEIGHTS, load, refused, same_weights


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


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
def test_a_pickle_is_not_opened(saved, canary, name, by):
    (saved / WEIGHTS).unlink()
    (saved / name).write_bytes(trapped(canary))
    with refused(saved, f"has no model.safetensors, only {name}, which can run code"):
        by(saved)


@pytest.mark.hazard(3)
def test_asking_for_it_takes_two_words(saved, canary):
    (saved / "pytorch_model.bin").write_bytes(trapped(canary))
    with refused(saved, "pass allow_pickle=True too"):
        load(saved, use_safetensors=False)


@pytest.mark.hazard(3)
def test_a_pickle_that_is_allowed_still_runs_no_code(saved, canary):
    (saved / WEIGHTS).unlink()
    (saved / "pytorch_model.bin").write_bytes(trapped(canary))
    with refused(saved, "eights", Exception):
        load(saved, allow_pickle=True)


@pytest.mark.hazard(3)
def test_a_pickle_that_is_allowed_and_harmless(saved, model):
    (saved / WEIGHTS).unlink()
    torch.save(model.state_dict(), saved / "pytorch_model.bin")
    assert same_weights(load(saved, allow_pickle=True), model)


@pytest.mark.hazard(3)
def test_safetensors_win_over_a_pickle(saved, model, canary):
    (saved / "pytorch_model.bin").write_bytes(trapped(canary))
    assert same_weights(load(saved, allow_pickle=True), model)


@pytest.mark.hazard(3)
@pytest.mark.parametrize("shard", ["../pytorch_model.bin", "/pytorch_model.bin", "model.sh"])
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
def test_a_distributed_checkpoint_is_refused(saved, canary, by, is_alone):
    """Its .metadata is a pickle that PyTorch opens with the power to run code."""
    if is_alone:
        (saved / WEIGHTS).unlink()
    (saved / ".metadata").write_bytes(pickle.dumps(Trap(canary)))
    (saved / "__0_0.distcp").write_bytes(trapped(canary))
    with refused(saved, "is a distributed checkpoint of PyTorch, whose .metadata can run code; resume the run"):
        by(saved)


@pytest.mark.hazard(28)
def test_a_real_distributed_checkpoint(model, tmp_path):
    from torch.distributed import checkpoint as dcp

    folder = tmp_path / "run"
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder, no_dist=True)
    model.config.save_pretrained(folder)
    with refused(folder, "is a distributed checkpoint of PyTorch"):
        load(folder)
