"""``omnimoe convert`` and the function behind it: both ways, by folder, by model, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from omnimoe import CheckpointError, OmniMoeForCausalLM, convert_checkpoint, from_pretrained, load, shrink
from omnimoe.cli import main
from omnimoe.convert import CONVERTERS, folders
from tests.checkpoint.files import contents
from tests.zoo.seeds.tiny import publish, published_model


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return publish(published_model("mixtral"), tmp_path_factory.mktemp("mixtral"), max_shard_size="100KB")


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_the_command_both_ways(mixtral, tmp_path, capsys):
    assert len(list(mixtral.glob("*.safetensors"))) > 1, "a checkpoint in shards"
    assert main(["convert", str(mixtral), str(tmp_path / "ours")]) == 0
    assert "family mixtral, as omnimoe's" in capsys.readouterr().out
    back = ["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "published", "--json"]
    assert main([*back, "--max-shard-size", "50KB"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["family"] == "mixtral"
    held, found = tensors_of(mixtral), tensors_of(tmp_path / "back")
    assert told["num_tensors"] == len(held) == len(found)
    assert told["num_bytes"] == sum(tensor.nbytes for tensor in held.values())
    assert all(torch.equal(tensor, found[name]) for name, tensor in held.items())


def test_a_model_that_was_trained_goes_back(mixtral, tmp_path):
    model = from_pretrained(mixtral)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert convert_checkpoint(model, tmp_path / "back", to="published").family == "mixtral"
    assert torch.equal(tensors_of(tmp_path / "back")["model.norm.weight"], tensors_of(mixtral)["model.norm.weight"] * 2)
    model.save_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "again", to="published")
    assert torch.equal(
        tensors_of(tmp_path / "again")["model.norm.weight"], tensors_of(tmp_path / "back")["model.norm.weight"]
    )


def test_a_fresh_model_of_the_zoo_can_be_published(tmp_path):
    config = load("smollm2_135m", device="meta").config
    small = {**config.published["files"]["config.json"], "num_hidden_layers": 1, "vocab_size": 64, "hidden_size": 18}
    model = OmniMoeForCausalLM(CONVERTERS.get("llama").config_of(small))
    convert_checkpoint(model, tmp_path, to="published")
    assert torch.equal(tensors_of(tmp_path)["model.embed_tokens.weight"], model.model.embed_tokens.weight)


def test_refusals_leave_the_destination_alone(mixtral, tmp_path, capsys):
    ours = tmp_path / "ours"
    convert_checkpoint(mixtral, ours)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "note.txt").write_text("mine")
    for source, options, message in (
        (ours, {}, "no checkpoint of a family that is converted, or one of omnimoe already"),
        (mixtral, {"to": "published"}, "as it is published, of family mixtral"),
        (mixtral, {"to": "gguf"}, "converted to 'omnimoe' or 'published', not to 'gguf'"),
        (tmp_path / "nowhere", {}, "nowhere"),
        (load("mot_37m", device="meta"), {}, "pass to='published'"),
        (load("mot_37m", device="meta"), {"to": "published"}, "this model came from no published checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(source, tmp_path / "kept", **options)
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert_checkpoint(mixtral, mixtral)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["note.txt"]
    assert main(["convert", str(ours), str(tmp_path / "kept")]) == 2
    assert capsys.readouterr().err.startswith("omnimoe convert: ")


@pytest.mark.parametrize("to", ["omnimoe", "published"])
def test_a_model_that_is_there_is_replaced_only_if_told(mixtral, tmp_path, capsys, to):
    source = mixtral
    if to == "published":
        convert_checkpoint(mixtral, source := tmp_path / "ours")
    there = tmp_path / "there"
    load("mot_nano", num_layers=1, seed=0).save_pretrained(there, max_shard_size="400KB")
    (there / "notes.txt").write_text("mine")
    before = contents(there)
    with pytest.raises(CheckpointError, match=r"there holds README.md, config.json, .* more already; name another"):
        convert_checkpoint(source, there, to=to)
    assert main(["convert", str(source), str(there), "--to", to]) == 2
    assert "pass overwrite=True (--overwrite) to replace them" in capsys.readouterr().err
    assert contents(there) == before
    assert main(["convert", str(source), str(there), "--to", to, "--overwrite"]) == 0
    convert_checkpoint(source, tmp_path / "fresh", to=to)
    fresh, replaced = contents(tmp_path / "fresh"), contents(there)
    assert replaced.pop("notes.txt") == before["notes.txt"]
    cards = [(tmp_path / name / "README.md").read_text().replace(name, "NAME") for name in ("there", "fresh")]
    assert cards[0] == cards[1], "a card differs by the name of its folder alone"
    assert replaced.pop("README.md") != before["README.md"]
    fresh.pop("README.md")
    assert replaced == fresh, "nothing of the earlier model is left"


@pytest.mark.parametrize("to", ["omnimoe", "published"])
def test_a_conversion_that_fails_midway_leaves_what_it_was_told_to_replace(mixtral, tmp_path, monkeypatch, to):
    source = mixtral
    if to == "published":
        convert_checkpoint(mixtral, source := tmp_path / "ours")
    convert_checkpoint(mixtral, tmp_path / "there")
    before = contents(tmp_path / "there")

    def fail(*args, **kwargs):
        raise OSError("a broken disk")

    monkeypatch.setattr(folders, "_copy_beside", fail)  # the last thing that is written
    with pytest.raises(OSError, match="a broken disk"):
        convert_checkpoint(source, tmp_path / "there", to=to, overwrite=True)
    assert contents(tmp_path / "there") == before


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "model-00001-of-00002.safetensors", "manifest.json"])
def test_a_file_of_the_user_is_not_replaced_unasked(mixtral, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match=f"holds {name} already"):
        convert_checkpoint(mixtral, tmp_path)
    assert contents(tmp_path).keys() == {name}
    assert (tmp_path / name).read_text() == "mine"


def test_a_model_that_is_no_longer_of_its_family_stays_ours(mixtral, tmp_path):
    model = from_pretrained(mixtral)
    model.config.tie_word_embeddings = True
    with pytest.raises(CheckpointError, match="tie_word_embeddings of its config changed since"):
        convert_checkpoint(model, tmp_path / "back", to="published")
    assert shrink(from_pretrained(mixtral).config).published == {}, "a changed config is no published one"


def test_a_file_that_was_tampered_with_is_refused(mixtral, tmp_path):
    convert_checkpoint(mixtral, tmp_path / "ours")
    plain = json.loads((tmp_path / "ours" / "config.json").read_text())
    plain["published"]["repeated"] = ["model.norm.weight"]
    (tmp_path / "ours" / "config.json").write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match="mixtral repeats no such tensor"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="published")
    plain["published"]["repeated"] = 3
    (tmp_path / "ours" / "config.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"published\['repeated'\] must be a list of names, got 3"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="published")
    plain["published"] = {"family": "mixtrel", "files": plain["published"]["files"]}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match="did you mean 'mixtral'"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="published")
    plain["published"] = {"family": "mixtral", "files": {"../evil.json": {}}}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match="has lost the mixtral config it came with, config.json"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="published")
    assert not (tmp_path / "evil.json").exists()
