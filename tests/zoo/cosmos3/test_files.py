"""Published folders of Cosmos3: read and written to the bit, strict, and of the published size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import omnimoe
from omnimoe.convert import to_omnimoe, to_published
from omnimoe.model import MODELS, OmniMoeForCausalLM
from omnimoe.zoo.cosmos3.convert import COSMOS3, ROOT, TRANSFORMER, VISION
from tests.zoo.cosmos3.tiny import KINDS, ROOT_OF, TRANSFORMER_OF, batch, make_model, samples
from tests.zoo.hollow import loads_and_saves, refuses

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=KINDS)
def model(request) -> OmniMoeForCausalLM:
    return make_model(request.param)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("published") / "cosmos3"
    to_published(model, made)
    for name in ("vae", "scheduler"):  # other parts of the pipeline lie beside
        (made / name).mkdir()
        (made / name / "config.json").write_text("{}")
    (made / "model_index.json").write_text("{}")
    return made


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_one_file_or_many_are_read_and_written_to_the_bit(model, folder, tmp_path):
    to_published(model, tmp_path / "many", max_shard_size="60KB")
    index = json.loads((tmp_path / "many" / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    assert not any("/" in shard for shard in index.values()), "an index names files beside it"
    for place in (folder, tmp_path / "many"):
        assert same(dict(omnimoe.from_pretrained(place).state_dict()), dict(model.state_dict()))
    to_published(omnimoe.from_pretrained(tmp_path / "many"), tmp_path / "again")
    for name in (WEIGHTS, "vision_encoder/model.safetensors"):
        assert same(load_file(folder / name), load_file(tmp_path / "again" / name))
    for name in (ROOT, TRANSFORMER):
        assert json.loads((folder / name).read_text()) == json.loads((tmp_path / "again" / name).read_text())


@torch.no_grad()
def test_a_converted_folder_is_a_model_of_ours(model, folder, tmp_path):
    to_omnimoe(folder, tmp_path / "ours", COSMOS3)
    assert (tmp_path / "ours" / "vae" / "config.json").is_file()
    assert (tmp_path / "ours" / "model_index.json").is_file()
    again = omnimoe.from_pretrained(tmp_path / "ours")
    assert same(dict(again.state_dict()), dict(model.state_dict()))
    given = batch(model, samples(model.config.published["files"][ROOT]["model_type"]))
    wanted, found = model(**given), again(**given)
    assert torch.equal(found.logits, wanted.logits), "tables that no file holds were made anew"
    assert torch.equal(found.predictions["video"], wanted.predictions["video"])
    to_published(tmp_path / "ours", tmp_path / "back")
    assert same(load_file(folder / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS))


@torch.no_grad()
@pytest.mark.parametrize("chosen", [{"towers": ["text", "vision"]}, {"towers": ["video"]}, {"without": ["action"]}])
def test_a_part_of_a_converted_folder(model, folder, tmp_path, chosen):
    """What is kept gives what the whole model gives."""
    to_omnimoe(folder, tmp_path / "ours", COSMOS3)
    part = omnimoe.from_pretrained(tmp_path / "ours", **chosen)
    assert part.num_parameters() < model.num_parameters()
    held = samples(model.config.published["files"][ROOT]["model_type"])
    if "without" in chosen:
        given = batch(part, [held[1]])
        assert torch.equal(part(**given).predictions["video"], model(**batch(model, [held[1]])).predictions["video"])
    elif "text" in chosen["towers"]:
        given = batch(part, [held[3]])
        wanted = model(**batch(model, [held[3]])).logits
        assert torch.allclose(part(**given).logits, wanted[..., : part.config.vocab_size], atol=1e-5)
    else:
        assert part.config.modality_names == ("video",)


def changed(folder: Path, place: Path, change) -> Path:
    shutil.copytree(folder, place)
    held = load_file(place / WEIGHTS)
    change(held)
    save_file(held, place / WEIGHTS)
    return place


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: held.pop("layers.2.mlp_moe_gen.up_proj.weight"), r"layers\.2\.mlp_moe_gen\.up_proj\.weight"),
        (lambda held: held.update({"layers.0.extra.weight": torch.ones(2)}), r"(?s)extra.*says less than the weights"),
        (lambda held: held.update({"proj_in.bias": torch.ones(3)}), r"(?s)proj_in\.bias.*models of different sizes"),
        (
            lambda held: [held.update({f"model.{name}": held.pop(name)}) for name in list(held)],
            r"carry the prefix 'model\.'",
        ),
    ],
    ids=["missing", "extra", "misshapen", "prefixed"],
)
def test_keys_that_do_not_fit_are_named(folder, tmp_path, change, said):
    with pytest.raises(omnimoe.CheckpointError, match=said):
        omnimoe.from_pretrained(changed(folder, tmp_path / "wrong", change))


def test_a_missing_vision_tower_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "blind")
    (tmp_path / "blind" / "vision_encoder" / "model.safetensors").unlink()
    with pytest.raises(omnimoe.CheckpointError, match=r"no vision_encoder/model\.safetensors"):
        omnimoe.from_pretrained(tmp_path / "blind")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"joint_attn_implementation": "three_way"}, "joint_attn_implementation is 'three_way'"),
        ({"patch_latent_dim": 13}, "patch_latent_dim 13 is not latent_channel 3 times"),
        ({"hidden_act": "gelu"}, "malformed: KeyError"),
        ({"qk_norm_for_text": False, "use_und_k_norm_for_gen": False}, "which no published model has"),
    ],
)
def test_a_config_that_asks_for_more_is_refused(changes, said):
    files = {ROOT: ROOT_OF["cosmos3_omni"], TRANSFORMER: {**TRANSFORMER_OF["cosmos3_omni"], **changes}}
    with pytest.raises(omnimoe.CheckpointError, match=said):
        COSMOS3.config_of(files)


PUBLISHED = {
    # tensors and parameters of the transformer, then of the vision tower. The published index of Nano lists 1,165
    # tensors; the files of Super for pictures are 127,997,348,864 and 1,190,568,352 bytes, two a parameter and headers
    "cosmos3_nano": (814, 15_173_669_120, 351, 576_388_336),
    "cosmos3_super": (1430, 64_019_736_832, 351, 595_266_800),
    "cosmos3_super_t2i": (1425, 63_998_594_304, 351, 595_266_800),
    "cosmos3_edge": (549, 3_369_657_024, 443, 489_342_704),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_is_the_published_list(name, tmp_path):
    """Against the classes of diffusers and transformers, built from the same published config."""
    diffusers = pytest.importorskip("diffusers", reason="pip install 'omnimoe[diffusers]'")
    config = MODELS.get(name)()
    files = config.published["files"]
    fields = {
        key: value for key, value in files[TRANSFORMER].items() if key not in ("_class_name", "max_position_embeddings")
    }
    with torch.device("meta"):
        plan = COSMOS3.plan(OmniMoeForCausalLM(config))
        peer = diffusers.Cosmos3OmniTransformer(**fields)
    wanted = {key: tuple(held.shape) for key, held in peer.state_dict().items()}
    seen = {key: shape for key, shape in plan.published.items() if key.startswith(VISION)}
    made = {key: shape for key, shape in plan.published.items() if key not in seen}
    assert made == wanted
    counts = [(len(part), sum(torch.Size(shape).numel() for shape in part.values())) for part in (made, seen)]
    assert (*counts[0], *counts[1]) == PUBLISHED[name]
    loads_and_saves(name, plan.published, tmp_path)


def test_a_key_that_does_not_fit_is_named_at_full_size(tmp_path):
    keys = COSMOS3.plan(omnimoe.load("cosmos3_nano", device="meta")).published
    refuses("cosmos3_nano", keys, tmp_path, "layers.3.mlp_moe_gen.down_proj.weight", "layers.3.mlp_gen.down.weight")


@pytest.mark.parametrize("name", ["cosmos3_nano", "cosmos3_edge"])
def test_the_vision_tower_is_the_published_list(name):
    from transformers import AutoModelForImageTextToText
    from transformers.models.cosmos3_edge.configuration_cosmos3_edge import Cosmos3EdgeConfig
    from transformers.models.cosmos3_omni.configuration_cosmos3_omni import Cosmos3OmniConfig

    config = MODELS.get(name)()
    root = config.published["files"][ROOT]
    made = Cosmos3EdgeConfig if name == "cosmos3_edge" else Cosmos3OmniConfig
    text = {"hidden_size": config.hidden_size, "num_hidden_layers": 1, "vocab_size": 64, "pad_token_id": 0}
    if name == "cosmos3_nano":
        text |= {"model_type": "qwen3_vl_text"}
    with torch.device("meta"):
        peer = AutoModelForImageTextToText.from_config(
            made(text_config=text, vision_config={**root["vision_config"]}, **_tokens(root))
        )
        plan = COSMOS3.plan(OmniMoeForCausalLM(config))
    lead = "" if name == "cosmos3_edge" else "model.visual."
    wanted = {
        VISION + key.removeprefix(lead): tuple(held.shape)
        for key, held in peer.state_dict().items()
        if key.startswith(("model.visual.", "model.projector."))
    }
    assert {key: shape for key, shape in plan.published.items() if key.startswith(VISION)} == wanted


def _tokens(root: dict) -> dict[str, int]:
    return {name: root[name] for name in root if name.endswith("_token_id")}
