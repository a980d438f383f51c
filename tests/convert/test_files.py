"""Files of weights, written part by part and read slice by slice; safetensors itself is the judge."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from omnimoe import CheckpointError
from omnimoe.convert.files import DTYPES, Held, Weights, main_dtype, write_weights

TENSORS = {
    "bank": torch.arange(24.0).reshape(2, 3, 4),
    "half": torch.arange(10, dtype=torch.bfloat16),
    "ids": torch.arange(5),
    "flag": torch.tensor([True, False, True]),
    "byte": torch.arange(3, dtype=torch.uint8),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
}


def write(folder, tensors=TENSORS, **options):
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_weights(
        folder, kinds, lambda name: tensors[name].split(1) if tensors[name].ndim else [tensors[name]], **options
    )
    return folder


def assert_equal(found, wanted) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_a_file_is_what_safetensors_reads(tmp_path):
    write(tmp_path)
    assert_equal(load_file(tmp_path / "model.safetensors"), TENSORS)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("name", DTYPES)
def test_every_type(name, tmp_path):
    wanted = {"a": torch.ones(3, 2).to(DTYPES[name]), "b": torch.zeros(1)}
    write(tmp_path, wanted)
    assert_equal(load_file(tmp_path / "model.safetensors"), wanted)
    with Weights(tmp_path) as weights:
        assert weights.dtypes["a"] == DTYPES[name]


def test_shards_and_their_index(tmp_path):
    write(tmp_path, max_shard_size=60)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert_equal({name: load_file(tmp_path / index["weight_map"][name])[name] for name in TENSORS}, TENSORS)


@pytest.mark.parametrize("size", ["5GB", 60])
def test_reading_whole_tensors_and_slices(tmp_path, size):
    with Weights(write(tmp_path, max_shard_size=size)) as weights:
        assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
        assert_equal({name: weights.read(name) for name in TENSORS}, TENSORS)
        region = (slice(1, 2), slice(1, 3))
        assert torch.equal(weights.read("bank", region), TENSORS["bank"][1:2, 1:3])
        assert torch.equal(Held(TENSORS).read("bank", region), TENSORS["bank"][1:2, 1:3])
        assert main_dtype(weights.dtypes, weights.shapes) == torch.float32


def test_several_files_under_prefixes(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "ema.safetensors")
    save_file({"w": torch.zeros(3)}, tmp_path / "ae.safetensors")
    with Weights(tmp_path, {"": "ema.safetensors", "vae.": "ae.safetensors"}) as weights:
        assert weights.shapes == {"w": (2,), "vae.w": (3,)}
        assert weights.read("vae.w").tolist() == [0, 0, 0]
    save_file({"vae.w": torch.ones(2)}, tmp_path / "ema.safetensors")
    with pytest.raises(CheckpointError, match="holds w, which another file of the folder holds too"):
        Weights(tmp_path, {"": "ema.safetensors", "vae.": "ae.safetensors"})


def test_a_part_too_few_is_an_error_and_not_a_short_file(tmp_path):
    with pytest.raises(ValueError, match="a was to end at byte 16 of model.safetensors, but its parts end at 8"):
        write_weights(tmp_path, {"a": (torch.float32, (4,))}, lambda name: [torch.ones(2)])


def test_quantised_types_are_refused(tmp_path):
    save_file({"a": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="a is F8_E4M3, a quantised type"):
        Weights(tmp_path)


@pytest.mark.parametrize("shard", ["../evil.safetensors", "/etc/passwd", "code.py", 3])
def test_an_index_that_leads_out_is_refused(shard, tmp_path):
    for name in ("model.safetensors", "ema.safetensors"):
        (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(CheckpointError, match=r"names|weight_map"):
            Weights(tmp_path, {"": name})


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no model.safetensors, no weights"):
        Weights(tmp_path)
    with pytest.raises(CheckpointError, match="has no ema.safetensors; fetch or copy it again"):
        Weights(tmp_path, {"": "ema.safetensors"})
    (tmp_path / "ema.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="git-lfs"):
        Weights(tmp_path, {"": "ema.safetensors"})
    write(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match="cut off"):
        Weights(tmp_path)


def test_names_that_are_spelled_otherwise(tmp_path):
    write(tmp_path, {"old.a": torch.ones(1), "old.b": torch.zeros(2), "new.b": torch.ones(2), "c": torch.ones(3)})
    with Weights(tmp_path) as weights:
        weights.respell({r"^old\.": "new.", r"^c$": "d"})
        assert set(weights.shapes) == set(weights.dtypes) == {"new.a", "new.b", "old.b", "d"}
        assert torch.equal(weights.read("new.b"), torch.ones(2)), "a name that the file holds is kept"
        assert torch.equal(weights.read("d"), torch.ones(3))
