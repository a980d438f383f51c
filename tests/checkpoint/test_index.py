"""Indexes that lead out of their folder or are malformed, and shards that are not what the index says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from omnimoe import convert_checkpoint, from_pretrained
from omnimoe import load as load_model
from omnimoe.checkpoint.folder import parts_of
from tests.checkpoint.files import INDEX, WEIGHTS, edit, load, same_weights
from tests.children import capped
from tests.refusals import refused

OUTSIDE = "a shard is a .safetensors file in the same folder"


def point(folder: Path, shard: str) -> None:
    """Lets one weight of the index be looked for in ``shard``."""
    plain = json.loads((folder / INDEX).read_text())
    plain["weight_map"]["model.norm.weight"] = shard
    (folder / INDEX).write_text(json.dumps(plain))


@pytest.fixture
def evil(sharded) -> Path:
    """A file beside the folder that somebody wants read."""
    path = sharded.parent / "evil.safetensors"
    path.write_bytes((sharded / min(shards(sharded))).read_bytes())
    return path


def shards(folder: Path) -> dict[str, list[str]]:
    """The weights that the index looks for in each shard."""
    held: dict[str, list[str]] = {}
    for key, shard in json.loads((folder / INDEX).read_text())["weight_map"].items():
        held.setdefault(shard, []).append(key)
    return held


@pytest.mark.hazard(5)
@pytest.mark.parametrize(
    "shard",
    [
        "../evil.safetensors",
        "../../evil.safetensors",
        "./../evil.safetensors",
        "sub/../../evil.safetensors",
        "{outside}",
        "//server/share/evil.safetensors",
        "\\\\server\\share\\evil.safetensors",
        "C:\\evil.safetensors",
        "C:evil.safetensors",
        "..\\evil.safetensors",
        "sub\\evil.safetensors",
        "sub/evil.safetensors",
        "file:///evil.safetensors",
        "~/evil.safetensors",
        "evil.safetensors\0.bin",
        "evil.safetensors\n",
        ".safetensors",
        "",
        "evil.bin",
        "evil.safetensors.bin",
    ],
)
def test_a_path_out_of_the_folder(sharded, evil, shard):
    point(sharded, shard.format(outside=evil))
    with refused(sharded.parent, OUTSIDE):
        load(sharded)


@pytest.mark.hazard(5)
@pytest.mark.parametrize("name", ["shard", INDEX, "config.json", "generation_config.json"])
def test_a_link_out_of_the_folder(sharded, evil, name):
    path = sharded / (min(shards(sharded)) if name == "shard" else name)
    path.replace(sharded.parent / "real")
    path.symlink_to(sharded.parent / "real")
    with refused(sharded.parent, "is a link out of its folder"):
        load(sharded)


@pytest.mark.hazard(5)
def test_a_link_to_nowhere_and_one_to_itself(sharded):
    path = sharded / min(shards(sharded))
    path.unlink()
    path.symlink_to("nothing")
    with refused(sharded, "is missing; it holds"):
        load(sharded)
    path.unlink()
    path.symlink_to(path.name)
    with refused(sharded, path.name):
        load(sharded)


@pytest.mark.hazard(5)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@capped(256 << 20, seconds=60)
def test_a_pipe_in_place_of_weights_is_not_waited_for(saved):
    (saved / WEIGHTS).unlink()
    os.mkfifo(saved / WEIGHTS)
    with refused(saved, "is no regular file"):
        load(saved)


TO_READ = {
    "the class": load,
    "from_pretrained": from_pretrained,
    "a tower": lambda folder: from_pretrained(folder, towers=["text"]),
    "load": lambda folder: load_model(f"local-dir:{folder}"),
    "convert": lambda folder: convert_checkpoint(folder, folder.parent / "written"),
    "convert back": lambda folder: convert_checkpoint(folder, folder.parent / "written", to="published"),
}


@pytest.mark.hazard(5)
@pytest.mark.parametrize("by", TO_READ)
@pytest.mark.parametrize("model_type", ["omnimoe", "llama"])
def test_a_config_that_is_a_link_is_not_followed(saved, by, model_type):
    """Not even to learn what kind of model it is of."""
    path = saved / "config.json"
    held = json.loads(path.read_text()) | {"model_type": model_type}
    path.unlink()
    (saved.parent / "real").write_text(json.dumps(held))
    path.symlink_to(saved.parent / "real")
    with refused((saved, saved.parent / "written"), "config.json is a link out of its folder"):
        TO_READ[by](saved)


@pytest.mark.hazard(5)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize(
    ("by", "name"), [*((by, "config.json") for by in TO_READ), ("from_pretrained", "generation_config.json")]
)
@capped(2 << 30, seconds=60)
def test_a_pipe_in_place_of_a_config_is_not_waited_for(saved, by, name):
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with refused((saved, saved.parent / "written"), f"{name} is no regular file"):
        TO_READ[by](saved)


@pytest.mark.hazard(5)
def test_the_cache_of_the_hub_is_made_of_links(saved, model, tmp_path):
    """Its files lie beside the folder, where it keeps all of them; one link further out is refused there too."""
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(saved.iterdir())):
        path.replace(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert same_weights(load(snapshot), model)
    held = (snapshot / WEIGHTS).resolve()
    held.replace(repository / "elsewhere")
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(repository / "elsewhere")
    with refused(snapshot, "is a link out of its folder"):
        load(snapshot)


def test_a_folder_that_is_a_link_and_links_in_a_folder(saved, model):
    (saved / WEIGHTS).replace(saved / "weights")
    (saved / WEIGHTS).symlink_to("weights")
    (saved.parent / "link").symlink_to(saved)
    assert same_weights(load(saved.parent / "link"), model)


@pytest.mark.hazard(6)
@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object, not list"),
        ("null", "must hold a JSON object, not NoneType"),
        ("{}", "has no weight_map"),
        ('{"weight_map": null}', "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {"a": ["b.safetensors"]}}', "has no weight_map"),
        ('{"weight_map": {"a": null}}', "has no weight_map"),
        ('{"metadata": [], "weight_map": {"a": "b.safetensors"}}', "has metadata [], not an object"),
        ('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "the key 'a' stands there twice"),
        ('{"a":' * 50_000, "cannot be read as JSON"),
        ("\ud800", "cannot be read as JSON"),
        (" " * ((32 << 20) + 1), "no config or index has more than 33,554,432"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
@capped(256 << 20)
def test_a_malformed_index(sharded, content, fragment):
    (sharded / INDEX).write_bytes(content.encode("utf-8", "surrogatepass"))
    with refused(sharded, fragment):
        load(sharded)


@pytest.mark.hazard(6)
@capped(256 << 20)
def test_an_index_and_a_file_of_its_own(sharded, saved):
    """Which of the two is the newer save nobody can tell; transformers would take the file."""
    (sharded / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes())
    with refused(sharded, "of which one is left from an earlier save; remove the older"):
        load(sharded)


@pytest.mark.hazard(7)
@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize(
    ("size", "fragment"),
    [
        (None, "is missing"),
        (0, "has 0 bytes"),
        (5, "has 5 bytes"),
        (40, "more than the file itself"),
        (-1, "is cut off"),
        (-100, "is cut off"),
    ],
)
def test_a_shard_that_is_missing_or_cut_is_named_with_what_it_held(sharded, which, size, fragment):
    name, keys = sorted(shards(sharded).items())[which]
    path = sharded / name
    content = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(content[:size])
    with refused(sharded, fragment) as told:
        load(sharded)
    assert name in str(told)
    # messages are sentences: the parts stand at their end, in the words of parts_of
    assert parts_of(keys) in str(told)


@pytest.mark.hazard(7)
@pytest.mark.parametrize("file", [WEIGHTS, INDEX])
def test_no_weights_at_all(saved, sharded, file):
    (saved / WEIGHTS).unlink()
    if file == INDEX:
        (sharded / INDEX).replace(saved / INDEX)
        with refused(saved, "is missing; it holds"):
            load(saved)
    else:
        with refused(saved, "has no model.safetensors, no weights"):
            load(saved)


@pytest.mark.hazard(7)
def test_a_shard_of_another_save(sharded):
    name, keys = min(shards(sharded).items())
    edit(sharded, lambda weights: weights.update(other=weights.pop(keys[0])), name)
    with refused(sharded, f"has no {keys[0]}, where the index looks for 1 weight"):
        load(sharded)


@pytest.mark.hazard(7)
def test_a_weight_in_two_shards(sharded):
    (first, keys), (second, _) = sorted(shards(sharded).items())[:2]
    taken = {}
    edit(sharded, lambda weights: taken.update({keys[0]: weights[keys[0]].clone()}), first)
    edit(sharded, lambda weights: weights.update(taken), second)
    with refused(sharded, f"holds {keys[0]}, and so does a shard before it"):
        load(sharded)


def test_shards_are_read(sharded, model):
    assert same_weights(load(sharded), model)


def test_a_variant_has_files_of_its_own(saved, model):
    model.save_pretrained(saved, variant="fp32", max_shard_size="12KB")
    assert same_weights(load(saved, variant="fp32"), model)
    assert same_weights(load(saved), model)
    next(iter(saved.glob("model.fp32-*"))).unlink()
    with refused(saved, "is missing; it holds"):
        load(saved, variant="fp32")
    with refused(saved, "must be a part of a file name"):
        load(saved, variant="../x")
