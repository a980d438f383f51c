"""Published checkpoints, opened and loaded: towers by suffix, files of their own, and everything that does not fit."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from omnimoe import CheckpointError, convert_checkpoint, from_pretrained, load
from omnimoe.checkpoint.errors import MisfitError
from omnimoe.convert import CONVERTERS, Published, find_converter, to_omnimoe, to_published
from omnimoe.convert.files import NAMES
from tests.children import capped
from tests.convert.twins import FILES, TWINS, random_tensors, write_twins
from tests.refusals import refused
from tests.zoo.seeds.tiny import publish, published_model

O_PROJ = "model.backbone.layers.1.self_attn.o_proj.weight"


@pytest.fixture
def twins(monkeypatch):
    """The family, registered for one test."""
    CONVERTERS.names()
    monkeypatch.setitem(CONVERTERS._parts, "twins", TWINS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return publish(published_model("llama"), tmp_path_factory.mktemp("llama"))


def changed(folder: Path, into: Path, change) -> Path:
    """A copy of a published folder whose tensors were changed in place."""
    into.mkdir(exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, into / "model.safetensors")
    (into / "config.json").write_text((folder / "config.json").read_text())
    return into


def test_towers_fused_rows_and_files_of_their_own(twins, tmp_path):
    theirs = random_tensors()
    model = from_pretrained(write_twins(tmp_path))
    held = model.state_dict()
    layer = "model.backbone.layers.1"
    assert torch.equal(held[f"{layer}.self_attn.o_proj.weight"][1], theirs["blocks.1.out_gen.weight"])
    assert torch.equal(held[f"{layer}.self_attn.v_proj.weight"][0], theirs["blocks.1.qkv.weight"][32:])
    query = theirs["blocks.1.qkv_gen.weight"][:16].unflatten(0, (2, 4, 2)).transpose(1, 2).flatten(0, 2)
    assert torch.equal(held[f"{layer}.self_attn.q_proj.weight"][1], query)
    assert torch.equal(held["lm_head.weight"], theirs["head.weight"].T)
    gate_up = torch.cat((theirs["blocks.1.gate_gen.weight"], theirs["blocks.1.up_gen.weight"]))
    assert torch.equal(held[f"{layer}.mlp.experts.gate_up_proj"][1], gate_up)
    ids = torch.tensor([[1, 2, 25, 26, 3]])
    assert model(ids, labels=ids).loss.isfinite()


def test_the_way_there_and_back(twins, tmp_path):
    theirs = random_tensors()
    write_twins(tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", max_shard_size=4000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="published")
    found = load_file(tmp_path / "back" / "ema.safetensors")
    assert found.keys() == theirs.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in theirs.items())
    assert {name: json.loads((tmp_path / "back" / name).read_text()) for name in FILES} == FILES


def test_a_tower_that_a_file_may_lack_stays_fresh(twins, tmp_path, caplog):
    theirs = {name: tensor for name, tensor in random_tensors().items() if "_gen." not in name}
    folder = write_twins(tmp_path / "theirs", theirs)
    model = from_pretrained(folder)
    assert "has no tower that draws, which it may lack: what its 12 tensors give is fresh" in caplog.text
    weight = model.state_dict()["model.backbone.layers.0.self_attn.o_proj.weight"]
    assert torch.equal(weight[0], theirs["blocks.0.out.weight"])
    assert weight[1].isfinite().all()
    assert weight[1].std() == pytest.approx(0.2, rel=0.3)
    with pytest.raises(CheckpointError, match="load it with from_pretrained and save the model"):
        convert_checkpoint(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    model.save_pretrained(tmp_path / "ours")
    for number, source in enumerate((model, tmp_path / "ours")):
        caplog.clear()
        convert_checkpoint(source, tmp_path / f"back{number}", to="published")
        assert "is written without the tower that draws, as it was read" in caplog.text
        found = load_file(tmp_path / f"back{number}" / "ema.safetensors")
        assert found.keys() == theirs.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in theirs.items())
    model.config.published["absent"] = ["head"]
    with pytest.raises(CheckpointError, match="'head' is absent, but twins has no such group"):
        convert_checkpoint(model, tmp_path / "none", to="published")


def test_a_tower_that_a_file_lacked_is_written_once_it_was_trained(twins, tmp_path, caplog):
    theirs = {name: tensor for name, tensor in random_tensors().items() if "_gen." not in name}
    model = from_pretrained(write_twins(tmp_path / "theirs", theirs))
    for dtype in (torch.float32, torch.bfloat16):
        convert_checkpoint(model.to(dtype), tmp_path / "same", to="published", overwrite=True)
        assert load_file(tmp_path / "same" / "ema.safetensors").keys() == theirs.keys()
    model = from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        model.state_dict()[O_PROJ][1, 0, 0] += 1
    model.save_pretrained(tmp_path / "ours")
    for number, source in enumerate((model, tmp_path / "ours")):
        caplog.clear()
        convert_checkpoint(source, tmp_path / f"back{number}", to="published")
        assert "is written with the tower that draws, read without it and changed since" in caplog.text
        found = load_file(tmp_path / f"back{number}" / "ema.safetensors")
        assert found.keys() == random_tensors().keys()
        assert torch.equal(found["blocks.1.out_gen.weight"], model.state_dict()[O_PROJ][1])
    shutil.copyfile(tmp_path / "theirs" / "picture.safetensors", tmp_path / "back1" / "picture.safetensors")
    again = from_pretrained(tmp_path / "back1")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    del model.config.published["start"]  # as models that were saved before have none
    model.config.published["absent"] = []
    convert_checkpoint(model, tmp_path / "whole", to="published")
    assert load_file(tmp_path / "whole" / "ema.safetensors").keys() == random_tensors().keys()


@pytest.mark.parametrize("kept", [1, 11])
def test_a_tower_that_a_file_may_lack_is_not_lacked_in_part(kept, twins, tmp_path, caplog):
    theirs = random_tensors()
    tower = sorted(name for name in theirs if "_gen." in name)
    folder = write_twins(tmp_path, {name: held for name, held in theirs.items() if name not in tower[kept:]})
    with pytest.raises(CheckpointError, match=rf"{12 - kept} missing(.|\n)*may lack the tower that draws as a whole"):
        from_pretrained(folder)
    model = from_pretrained(folder, strict=False)
    assert "absent" not in model.config.published
    assert "may lack the tower that draws as a whole, and holds some of it" in caplog.text


def test_what_has_no_place_is_said_and_left_out(twins, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    from_pretrained(write_twins(tmp_path, {**random_tensors(), "blocks.0.steps": torch.ones(1)}))
    assert "the decoder of pictures, a model of its own" in caplog.text
    assert "a counter" in caplog.text


def test_the_licence_is_told_where_it_restricts(tmp_path, caplog):
    write_twins(tmp_path)
    with Published(tmp_path, dataclasses.replace(TWINS, notice="for research only")):
        assert "for research only" in caplog.text


@pytest.mark.parametrize(
    ("head", "told"),
    [
        ("license: apache-2.0", False),
        ("license: llama3.2", True),
        ("license: other\nlicense_name: qwen-research", True),
        ("tags: [a]", False),
        ("license: [unclosed", False),
        (None, False),
    ],
)
def test_a_licence_in_the_card_is_told_where_it_may_restrict(head, told, tmp_path, caplog):
    write_twins(tmp_path)
    if head is not None:
        (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# Twins\n")
    with Published(tmp_path, TWINS):
        assert ("which may restrict its use" in caplog.text) == told


def restricted(monkeypatch) -> None:
    """The family, under a licence that restricts."""
    told = dataclasses.replace(TWINS, notice="for research only", license="Research License")
    CONVERTERS.names()
    monkeypatch.setitem(CONVERTERS._parts, "twins", told)


@pytest.mark.parametrize(
    ("head", "licence"),
    [
        (None, {"license": "other", "license_name": "research-license"}),
        ("license: llama3.2\nlicense_link: https://example.org", {"license": "llama3.2"}),
    ],
    ids=["of the family", "of the checkpoint"],
)
def test_the_licence_goes_with_what_is_saved_and_converted(head, licence, monkeypatch, tmp_path, caplog):
    restricted(monkeypatch)
    theirs = write_twins(tmp_path / "theirs", {**random_tensors(), "blocks.0.steps": torch.ones(1)})
    if head is not None:
        (theirs / "README.md").write_text(f"---\n{head}\n---\n# Twins\n")
    model = from_pretrained(theirs)
    model.save_pretrained(tmp_path / "saved")
    convert_checkpoint(theirs, tmp_path / "ours")
    for name in ("saved", "ours"):
        card = metadata_load(tmp_path / name / "README.md")
        assert licence.items() <= card.items()
        caplog.clear()
        again = from_pretrained(tmp_path / name)
        assert "for research only" in caplog.text
        assert licence.items() <= again.config.card.items()
    if head is None:
        page = (tmp_path / "ours" / "README.md").read_text()
        assert "| licence | research-license |" in page
        assert "| dtype | float32 |" in page


def test_what_says_nothing_of_a_licence_is_given_none(twins, tmp_path, caplog):
    write_twins(tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert "not stated" in (tmp_path / "ours" / "README.md").read_text()
    assert getattr(from_pretrained(tmp_path / "ours").config, "card", None) is None
    assert "licence" not in caplog.text


def test_which_family_a_folder_belongs_to(twins, tmp_path, llama):
    assert find_converter(write_twins(tmp_path / "twins")) is TWINS
    assert find_converter(llama).name == "llama"
    convert_checkpoint(llama, tmp_path / "ours")
    assert find_converter(tmp_path / "ours") is None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    assert find_converter(tmp_path / "other") is None
    with pytest.raises(CheckpointError, match=r"no checkpoint of a family that is converted.*mixtral"):
        convert_checkpoint(tmp_path / "other", tmp_path / "x")
    with pytest.raises(CheckpointError, match="'bert', not 'omnimoe'"):
        from_pretrained(tmp_path / "other")


MISFITS = {
    "missing": (lambda held: held.pop("model.norm.weight"), "1 missing:\n  model.norm.weight"),
    "extra": (lambda held: held.update({"model.extra": torch.ones(2)}), "1 unexpected:\n  model.extra"),
    "shape": (
        lambda held: held.update({"model.norm.weight": torch.ones(5)}),
        r"\(5,\) in the file, \(48,\) in the model.*\nLikely cause: config and weights are of models of different",
    ),
    "wrapped": (
        lambda held: [held.update({f"module.{name}": held.pop(name)}) for name in list(held)],
        r"Likely cause: its names carry the prefix 'module\.'",
    ),
    "base alone": (
        lambda held: [held.update({name.removeprefix("model."): held.pop(name)}) for name in list(held)],
        r"Likely cause: its names lack the prefix 'model\.'",
    ),
    "quantised": (
        lambda held: held.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}),
        "Likely cause: the weights are quantised; take a copy in bfloat16",
    ),
    "quantised in blocks": (
        lambda held: held.update({"model.layers.0.mlp.up_proj_scale_inv": torch.ones(1)}),
        "Likely cause: the weights are quantised; take a copy in bfloat16",
    ),
    "adapter": (
        lambda held: held.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)}),
        "Likely cause: the file holds an adapter; merge it into its model first",
    ),
    "renamed": (
        lambda held: held.update({"model.last_norm.weight": held.pop("model.norm.weight")}),
        "Likely cause: renamed: model.last_norm.weight for model.norm.weight;",
    ),
    "in several layers": (
        lambda held: [
            held.pop(f"model.layers.{layer}.mlp.{site}_proj.weight") for layer in (0, 1) for site in ("up", "gate")
        ],
        r"4 missing:\n  model\.layers\.{0-1}\.mlp\.gate_proj\.weight \(2 times\)\n  model\.layers\.{0-1}\.mlp\.up_proj",
    ),
    "layers renamed": (
        lambda held: [
            held.update({name.replace("self_attn", "attention"): held.pop(name)})
            for name in [name for name in held if ".1.self_attn." in name]
        ],
        r"renamed: model\.layers\.1\.attention\.k_proj\.weight for model\.layers\.1\.self_attn\.k_proj\.weight, and 3",
    ),
    "a part": (
        lambda held: [held.pop(name) for name in [name for name in held if name.startswith("model.layers.1.")]],
        r"a file of the checkpoint is missing, or it was saved without model\.layers\.1\.\n",
    ),
    "types": (
        lambda held: held.update({"model.layers.0.mlp.up_proj.weight": torch.ones(80, 48).half()}),
        r"the copies of model.backbone.layers.0.mlp.experts.gate_up_proj are of several types",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_is_named_with_its_likely_cause(kind, llama, tmp_path):
    change, message = MISFITS[kind]
    folder = changed(llama, tmp_path / "bad", change)
    with pytest.raises(CheckpointError, match=f"(?s)do not fit its config as a llama model.*{message}"):
        from_pretrained(folder)
    with pytest.raises(CheckpointError):
        convert_checkpoint(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.hazard(10)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("name", ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "norm"])
def test_whole_numbers_are_no_weights(dtype, name, llama, tmp_path):
    key = f"model.{name}.weight"
    folder = changed(llama, tmp_path / "bad", lambda held: held.update({key: (held[key] * 100).to(dtype)}))
    ours = tmp_path / "ours"
    for act in (
        lambda: from_pretrained(folder, strict=True),
        lambda: from_pretrained(folder, strict=False),
        lambda: convert_checkpoint(folder, ours),
    ):
        with refused((folder, ours), f"{key}: {NAMES[dtype]} in the file, float32 in the model", MisfitError) as told:
            act()
        assert "take a copy in bfloat16" in str(told)


def test_the_rest_loads_where_that_is_asked_for(llama, tmp_path, caplog):
    folder = changed(llama, tmp_path / "bad", lambda held: held.pop("model.layers.1.mlp.down_proj.weight"))
    model, whole = from_pretrained(folder, strict=False), from_pretrained(llama)
    assert "What is missing is fresh" in caplog.text
    names = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, whole.state_dict()[name])]
    assert names == ["model.backbone.layers.1.mlp.experts.down_proj"]
    assert model.state_dict()[names[0]].isfinite().all()


def test_a_tied_head_that_is_stored_all_the_same(llama, tmp_path):
    def store(held):
        held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()

    folder = changed(llama, tmp_path / "stored", store)
    model = from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    convert_checkpoint(model, tmp_path / "back", to="published")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    convert_checkpoint(folder, tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "again", to="published")
    assert "lm_head.weight" in load_file(tmp_path / "again" / "model.safetensors")

    other = changed(folder, tmp_path / "other", lambda held: held["lm_head.weight"].add_(1e-3))
    with pytest.raises(
        CheckpointError, match="ties lm_head.weight to model.embed_tokens.weight, and the file holds two"
    ):
        from_pretrained(other)


def test_tables_of_rotary_frequencies_are_left_out(llama, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    model = from_pretrained(changed(llama, tmp_path / "old", lambda held: held.update({name: torch.ones(6)})))
    assert model.config.published["family"] == "llama"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias is True, and only False is converted"),
        ({"hidden_act": "mish"}, "activation 'mish' has no counterpart here"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"the weights are quantised \(fp8\)"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic' is not converted"),
        ({"hidden_size": "wide"}, "the published config is refused"),
        ({"num_attention_heads": 5}, "refused|fit"),
        ({"num_hidden_layers": -1}, "fit|malformed|refused"),
        ({"num_attention_heads": 0}, "malformed: ZeroDivisionError|refused"),
        ({"dtype": [1]}, r"dtype \[1\] is no name of a dtype"),
        ({"num_hidden_layers": 10**9}, "gives num_hidden_layers 1,000,000,000, beyond any model; at most 4,096"),
        ({"num_hidden_layers": 2 * 10**7}, "beyond any model"),
        ({"num_labels": 10**9}, "gives num_labels 1,000,000,000, beyond any model"),
        ({"vocab_size": 2**41}, "beyond any model"),
    ],
)
def test_a_config_that_is_not_converted_says_why(values, message, llama, tmp_path):
    folder = changed(llama, tmp_path, lambda held: None)
    plain = json.loads((llama / "config.json").read_text())
    if "rope_scaling" in values:
        plain.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps({**plain, **values}))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(folder)


def test_old_spellings_of_rotary_parameters(llama, tmp_path):
    plain = json.loads((llama / "config.json").read_text())
    plain.pop("rope_parameters")
    plain |= {"rope_theta": 123.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"}
    folder = changed(llama, tmp_path, lambda held: None)
    (folder / "config.json").write_text(json.dumps(plain))
    rope = from_pretrained(folder).config.attention.rope
    assert rope.theta == 123.0
    assert rope.scaling.factor == 2.0


def test_arguments_that_work_on_converted_checkpoints_say_so(llama, tmp_path):
    for options in ({"towers": ["text"]}, {"device_map": "auto"}):
        with pytest.raises(ValueError, match=r"published llama checkpoint.*omnimoe convert"):
            from_pretrained(llama, **options)
    assert load(str(llama), device="meta", num_layers=1).config.num_layers == 1


@pytest.mark.hazard(3)
@pytest.mark.parametrize("allow", [True, False])
@capped(512 << 20)
def test_pickles_of_other_families_are_not_read(llama, tmp_path, allow):
    folder = changed(llama, tmp_path / "bad", lambda held: None)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    assert from_pretrained(folder, allow_pickle=allow) is not None
    (folder / "model.safetensors").unlink()
    told = "reads those of omnimoe's own models alone; take a copy in safetensors" if allow else "which can run code"
    with refused(folder, told):
        from_pretrained(folder, allow_pickle=allow)


def test_numbers_that_are_none_are_reported(llama, tmp_path, caplog):
    folder = changed(llama, tmp_path, lambda held: held["model.norm.weight"].fill_(float("nan")))
    from_pretrained(folder)
    assert "hold NaN or infinity" in caplog.text
    with pytest.raises(CheckpointError, match="NaN"):
        from_pretrained(folder, check_finite="error")


def test_generation_settings_and_tokenizers_go_along(llama, tmp_path):
    folder = changed(llama, tmp_path / "theirs", lambda held: None)
    (folder / "generation_config.json").write_text('{"temperature": 0.625, "eos_token_id": [2, 7]}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_llama.py").write_text("raise SystemExit")
    assert from_pretrained(folder).generation_config.eos_token_id == [2, 7]
    convert_checkpoint(folder, tmp_path / "ours")
    assert from_pretrained(tmp_path / "ours").generation_config.temperature == 0.625
    assert (tmp_path / "ours" / "tokenizer.json").read_text() == "{}"
    assert not list((tmp_path / "ours").glob("*.py")), "no code goes along"


def test_generation_settings_that_mean_nothing(llama, tmp_path):
    folder = changed(llama, tmp_path, lambda held: None)
    (folder / "generation_config.json").write_text('{"max_new_tokens": "x"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be used"):
        from_pretrained(folder)


def test_an_outline_is_all_but_the_numbers(llama, tmp_path):
    """Of a model on the meta device or any other, in shards too; it is taken for weights nowhere."""
    hollow = from_pretrained(llama, device="meta")
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight of this model is on the meta device"):
        convert_checkpoint(hollow, tmp_path / "first", to="published")
    convert_checkpoint(hollow, tmp_path / "first", to="published", outline=True, max_shard_size="20KB")
    convert_checkpoint(from_pretrained(llama), tmp_path / "second", to="published", outline=True, max_shard_size="20KB")
    first, second = (
        {path.name: path.read_bytes() for path in tmp_path.glob(f"{part}/*")} for part in ("first", "second")
    )
    assert len(first) > 4
    assert first == second
    again = from_pretrained(tmp_path / "first", device="meta")
    assert {name: held.shape for name, held in again.state_dict().items()} == {
        name: held.shape for name, held in hollow.state_dict().items()
    }
    with torch.device("meta"):
        assert from_pretrained(tmp_path / "first").lm_head.weight.is_meta
    told = "is an outline, the names, shapes and types of .* without their numbers; load it with device='meta'"
    for use in (from_pretrained, lambda folder: convert_checkpoint(folder, tmp_path / "ours")):
        with pytest.raises(CheckpointError, match=told):
            use(tmp_path / "first")
    with pytest.raises(SafetensorError):
        load_file(next((tmp_path / "first").glob("*.safetensors")))
    with pytest.raises(ValueError, match="outline=True is for a model, got .*; load it with device='meta' first"):
        convert_checkpoint(tmp_path / "first", tmp_path / "more", to="published", outline=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_counts_past_any_model_are_refused_in_every_file():
    bagel = CONVERTERS.get("bagel")
    with pytest.raises(CheckpointError, match=r"llm_config\.json gives num_hidden_layers 20,000,000, beyond any model"):
        bagel.config_of({"llm_config.json": {"num_hidden_layers": 2 * 10**7}, "vit_config.json": {}})
    with pytest.raises(CheckpointError, match=r"vit_config\.json gives num_hidden_layers 5,000, beyond any model"):
        bagel.config_of({"llm_config.json": {}, "vit_config.json": {"num_hidden_layers": 5000}})


def test_host_memory_stays_at_the_size_of_a_tensor(tmp_path):
    """Fifty megabytes of experts, a bank of twelve; the largest published tensor has a quarter of one."""
    sizes = {"num_local_experts": 16, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    config = AutoConfig.for_model("mixtral", **sizes, vocab_size=50, num_attention_heads=4, num_key_value_heads=4)
    publish(AutoModelForCausalLM.from_config(config), tmp_path / "theirs")
    assert (tmp_path / "theirs" / "model.safetensors").stat().st_size > 48e6

    def anonymous() -> int:
        told = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", told).group(1))

    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell how memory is used")
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        to_omnimoe(tmp_path / "theirs", tmp_path / "ours", find_converter(tmp_path / "theirs"))
        to_published(tmp_path / "ours", tmp_path / "back")
    finally:
        done.set()
        watcher.join()
    assert peak[0] - before < 16e6
    assert (tmp_path / "back" / "model.safetensors").stat().st_size > 48e6
