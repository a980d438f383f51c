"""Bits that were lost: found by the hashes of the manifest, where the caller asks and where a run goes on."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from omnimoe import from_pretrained
from omnimoe.checkpoint.manifest import verify_folder
from omnimoe.publish import MANIFEST
from tests.checkpoint.files import INDEX, WEIGHTS, contents, load, same_weights
from tests.refusals import refused


def flip(path, place: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_every_file_of_a_save_is_listed(saved):
    listed = json.loads((saved / MANIFEST).read_text())
    assert listed["format"] == 1
    assert set(listed["files"]) == set(contents(saved)) - {MANIFEST, "README.md"}
    for name, held in listed["files"].items():
        content = (saved / name).read_bytes()
        assert held == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.hazard(15)
@pytest.mark.parametrize("by", [load, from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize(
    ("name", "value"), [(WEIGHTS, None), ("config.json", b'"eos_token_id": 2'), ("generation_config.json", b": 2,")]
)
def test_one_bit(saved, by, name, value):
    """In a JSON file that of a digit: what it says then is as good as before, and only the hash tells."""
    if value is None:
        flip(saved / name)
    else:
        content = (saved / name).read_bytes()
        flip(saved / name, content.index(value) + value.index(b"2"))
        by(saved)
    with refused(saved, f"{name} is not the file that was saved: its SHA-256 differs"):
        by(saved, verify=True)


@pytest.mark.hazard(15)
@pytest.mark.parametrize("by", [load, from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_weights_that_are_not_listed(saved, sharded, by):
    """They would be loaded unverified, from whoever put them there."""
    names = [(saved, WEIGHTS), (sharded, min(json.loads((sharded / INDEX).read_text())["weight_map"].values()))]
    for folder, name in [*names, (saved, "generation_config.json")]:
        plain = json.loads((folder / MANIFEST).read_text())
        held = plain["files"].pop(name)
        (folder / MANIFEST).write_text(json.dumps(plain))
        with refused(folder, f"{name} would be loaded, and manifest.json does not list it"):
            by(folder, verify=True)
        plain["files"][name] = held
        (folder / MANIFEST).write_text(json.dumps(plain))


@pytest.mark.hazard(15)
def test_a_lost_bit_is_not_seen_unasked(saved, model):
    """Which is why there is a manifest: the file is sound, and one weight of it is another."""
    flip(saved / WEIGHTS)
    loaded = load(saved)
    assert not same_weights(loaded, model)
    with refused(saved, "is not the file that was saved: its SHA-256 differs"):
        load(saved, verify=True)


@pytest.mark.hazard(15)
def test_a_bit_of_a_shard(sharded):
    name = min(json.loads((sharded / INDEX).read_text())["weight_map"].values())
    flip(sharded / name)
    with refused(sharded, f"{name} is not the file that was saved"):
        load(sharded, verify=True)


@pytest.mark.hazard(15)
@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "has no manifest.json to verify it by"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), "is no manifest of a save"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"a": 1}}'), "is no manifest of a save"),
        (lambda folder: (folder / "generation_config.json").unlink(), "is missing, and manifest.json lists it"),
        (lambda folder: (folder / WEIGHTS).open("ab").write(b" "), "bytes, and"),
    ],
    ids=["none", "empty", "malformed", "file_missing", "longer"],
)
def test_what_cannot_be_verified(saved, change, fragment):
    change(saved)
    with refused(saved, fragment):
        load(saved, verify=True)


@pytest.mark.hazard(15)
@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "a\\..\\secret", ".."])
def test_a_manifest_does_not_lead_out_of_the_folder(saved, name):
    (saved.parent / "secret").write_text("mine")
    (saved / MANIFEST).write_text(json.dumps({"files": {name: {"size": 4, "sha256": "0"}}}))
    with refused(saved, "which is not in the folder"):
        verify_folder(saved)


def test_verified_weights_are_the_saved_ones(saved, sharded, model):
    for folder in (saved, sharded):
        for by in (load, from_pretrained, AutoModelForCausalLM.from_pretrained):
            assert same_weights(by(folder, verify=True), model)


def test_files_beside_the_save_are_not_verified(saved, model):
    (saved / "notes.txt").write_text("mine")
    assert same_weights(load(saved, verify=True), model)
    assert torch.is_tensor(model.lm_head.weight)
