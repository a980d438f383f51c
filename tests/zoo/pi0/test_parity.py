"""pi0 at a tiny size: our model gives what transformers' gives, and its files are read and written to the bit."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PI0ForConditionalGeneration

import omnimoe
from omnimoe.checkpoint.errors import MisfitError
from omnimoe.convert import find_converter, to_omnimoe, to_published
from omnimoe.denoise import denoise
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.zoo.pi0 import PI0, pi0
from omnimoe.zoo.pi0.convert import ACTION, STATE, is_pi0, spelled_out
from tests.zoo.hollow import loads_and_saves, write_hollow
from tests.zoo.pi0.peer import (
    TINY,
    episodes,
    equal_weights,
    for_ours,
    for_peer,
    make_peer,
    published,
    published_name,
    save_published,
)
from tests.zoo.weights import close

PLAIN = published(**TINY)
HEAD = "model.paligemma_with_expert.gemma_expert.lm_head.weight"


@pytest.fixture(scope="module")
def peer() -> PI0ForConditionalGeneration:
    torch.manual_seed(0)
    return make_peer(PLAIN)


@pytest.fixture(scope="module")
def model(peer) -> OmniMoeForCausalLM:
    return equal_weights(peer, PLAIN)


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
    made = tmp_path_factory.mktemp("published")
    (made / "config.json").write_text(json.dumps(PLAIN))
    save_published(peer, made / "model.safetensors")
    return made


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("cameras", "words"), [((1,), (4,)), ((2, 2), (3, 3)), ((1, 3, 2), (6, 2, 1))], ids=["one", "even", "ragged"]
)
def test_velocities(model, peer, cameras, words, side):
    held = episodes(PLAIN, cameras, words)
    with torch.no_grad():
        wanted = peer(**for_peer(PLAIN, held)).logits
        out = model(**for_ours(model, held, side))
    close(out.predictions["action"].view_as(wanted), wanted)


def test_pictures_among_words(model, peer):
    held = episodes(PLAIN, (2, 1, 3), (5, 4, 3))
    given, theirs = for_ours(model, held, mixed=True), for_peer(PLAIN, held, mixed=True)
    with torch.no_grad():
        wanted = peer(**theirs).logits
        close(model(**given).predictions["action"].view_as(wanted), wanted)
    theirs.pop("timestep")
    noise = given["features"].pop("action")
    wanted = peer.sample_actions(**theirs)
    given.pop("timesteps")
    close(denoise(model, "action", **given, noise=noise, steps=10).view_as(wanted), wanted)


@pytest.mark.parametrize("words", [(4, 4), (5, 2)], ids=["even", "ragged"])
def test_no_picture_at_all(model, peer, words):
    """The reference has no such call, but for words in its cache: velocities, and actions drawn in ten steps."""
    held = episodes(PLAIN, (0, 0), words)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(episode.words) for episode in held], batch_first=True)
    mask = torch.tensor([[place < count for place in range(max(words))] for count in words]).long()
    ours = for_ours(model, held)
    assert "vision" not in ours["features"]
    with torch.no_grad():
        seen = peer.model.vlm(
            input_ids=ids,
            attention_mask=mask,
            position_ids=mask.cumsum(-1) - 1,
            token_type_ids=torch.zeros_like(ids),
            use_cache=True,
        ).past_key_values

        def velocities(actions: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            state = torch.stack([episode.state for episode in held])
            given = {"state": state, "noise": actions, "timestep": times, "attention_mask": mask}
            found = peer(**given, past_key_values=seen).logits
            seen.crop(ids.shape[1] - seen.get_seq_length())
            return found

        noise = torch.stack([episode.actions for episode in held])
        wanted = velocities(noise, torch.tensor([episode.time for episode in held]))
        close(model(**ours).predictions["action"].view_as(wanted), wanted)
        actions = noise
        for step in range(10):
            actions = actions - velocities(actions, torch.full((2,), 1 - step / 10)) / 10
    ours.pop("timesteps")
    start = ours["features"].pop("action")
    for use_cache in (True, False):
        found = denoise(model, "action", **ours, noise=start, steps=10, use_cache=use_cache)
        close(found.view_as(actions), actions)


def test_padding_between_words_and_state_is_not_seen(model, peer):
    """As the reference pads: behind the words. Positions then say where the tokens are."""
    held = episodes(PLAIN, (1, 2), (5, 2))
    given, whole = for_ours(model, held, "right"), for_peer(PLAIN, held)
    count = given["input_ids"].shape[1] - whole["input_ids"].shape[1]
    behind = torch.tensor([[STATE, *[ACTION] * (count - 1)]]).expand(2, -1)
    image = whole["input_ids"] == PLAIN["vlm_config"]["image_token_index"]
    given["input_ids"] = torch.cat((whole["input_ids"].masked_fill(image, 100), behind), dim=1)
    given["attention_mask"] = torch.cat((whole["attention_mask"], torch.ones(2, count, dtype=torch.long)), dim=1)
    given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        wanted = peer(**whole).logits
        close(model(**given).predictions["action"].view_as(wanted), wanted)


def test_every_layer_of_both_towers(model, peer):
    held = episodes(PLAIN, (2,), (4,))
    seen: dict[str, list[torch.Tensor]] = {"words": [], "actions": []}
    towers = {"words": peer.model.vlm.language_model, "actions": peer.model.dit}
    hooks = [
        layer.register_forward_hook(lambda module, args, out, name=name: seen[name].append(out))
        for name, tower in towers.items()
        for layer in tower.layers
    ]
    with torch.no_grad():
        peer(**for_peer(PLAIN, held))
        out = model(**for_ours(model, held), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    count, width = seen["words"][0].shape[1], TINY["acts"]
    for layer in range(TINY["layers"] - 1):  # what leaves the last goes through the norm
        found = out.hidden_states[layer + 1]
        close(found[:, :count], seen["words"][layer])
        close(found[:, count:, :width], seen["actions"][layer])
    for found in out.hidden_states:
        assert not found[:, count:, width:].any(), "columns that the narrow tower has not are zero"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("cameras", "words"), [((1, 2), (5, 3)), ((2, 1, 3), (2, 6, 3))], ids=["two", "ragged"])
def test_gradients(model, peer, cameras, words, side):
    held = episodes(PLAIN, cameras, words)
    shape = len(held), PLAIN["chunk_size"], PLAIN["max_action_dim"]
    actions = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    given = for_peer(PLAIN, held)
    peer.zero_grad()
    peer(**given, actions=actions).loss.backward()
    ours = for_ours(model, held, side)
    times, noise = given["timestep"].view(-1, 1, 1), given["noise"]
    ours["features"]["action"] = (times * noise + (1 - times) * actions).flatten(0, 1)
    model.zero_grad()
    out = model(**ours, targets={"action": (noise - actions).flatten(0, 1)})
    out.loss.backward()
    held_by = dict(model.named_parameters())
    wanted = {published_name(name): parameter.grad for name, parameter in peer.named_parameters()}
    compared = 0
    for piece in PI0.plan(model).pieces:
        grad = wanted[piece.published]
        found = held_by[piece.ours].grad
        assert found is not None, piece.ours
        if grad is None or grad.norm() < 1e-6:  # keys' biases, and what is behind the last attention of the words
            assert found.norm() < 1e-6, piece.ours
            continue
        close(piece.place(found), piece.change.into(grad))
        compared += 1
    assert compared > 50


@pytest.mark.parametrize("cameras", [(1,), (2, 1)], ids=["one", "ragged"])
def test_actions_drawn_in_ten_steps_with_what_stands_before_computed_once(model, peer, cameras):
    held = episodes(PLAIN, cameras, (3, 5)[: len(cameras)])
    given = for_peer(PLAIN, held)
    given.pop("timestep")
    wanted = peer.sample_actions(**given)
    ours = for_ours(model, held)
    ours.pop("timesteps")
    noise = ours["features"].pop("action")
    for use_cache in (True, False):
        found = denoise(model, "action", **ours, noise=noise, steps=10, use_cache=use_cache)
        close(found.view_as(wanted), wanted)


def test_pieces_into_a_cache(model):
    """The words and pictures, then the state, then the actions: what comes later is seen by nothing before it."""
    held = episodes(PLAIN, (1, 1), (4, 4))
    given = for_ours(model, held)
    ids, features, times = given["input_ids"], given["features"], given["timesteps"]
    cut = int((ids[0] == STATE).nonzero())
    assert int((ids[0] == ACTION).nonzero()[0]) == cut + 1
    with torch.no_grad():
        whole = model(**given)
        out = model(ids[:, :cut], features={"vision": features["vision"]}, use_cache=True)
        close(out.logits, whole.logits[:, :cut])
        out = model(ids[:, cut : cut + 1], features={"state": features["state"]}, past_key_values=out.past_key_values)
        out = model(
            ids[:, cut + 1 :],
            features={"action": features["action"]},
            timesteps=times,
            past_key_values=out.past_key_values,
        )
    close(out.predictions["action"], whole.predictions["action"])


def test_words_alone_are_those_of_paligemma(model, peer):
    """A batch without pictures, states and actions: logits of the language tower through its tied head."""
    tower, ids = peer.model.vlm.language_model, torch.tensor([[2, 5, 6, 7], [2, 8, 9, 10]])
    with torch.no_grad():
        hidden = peer.model.vlm(input_ids=ids, token_type_ids=torch.zeros_like(ids)).last_hidden_state
        wanted = hidden @ tower.embed_tokens.weight.T
        close(model(ids).logits, wanted)
    made = model.generate(ids, max_new_tokens=3, do_sample=False, min_new_tokens=3)
    assert made.shape == (2, 7)


def test_a_published_folder_in_and_out(model, peer, folder, tmp_path):
    again = omnimoe.from_pretrained(folder)
    for name, held in model.state_dict().items():
        assert torch.equal(held, again.state_dict()[name]), name
    to_omnimoe(folder, tmp_path / "ours", PI0, max_shard_size="20KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    converted = omnimoe.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(held, again.state_dict()[name]) for name, held in converted.state_dict().items())
    to_published(tmp_path / "ours", tmp_path / "back", max_shard_size="20KB")
    before = load_file(folder / "model.safetensors")
    after = {key: held for file in (tmp_path / "back").glob("*.safetensors") for key, held in load_file(file).items()}
    assert after.keys() == before.keys()
    assert not after.pop(HEAD).any(), "read by nothing, and there for those who want every name"
    assert all(torch.equal(held, before[name]) for name, held in after.items())
    shards = omnimoe.from_pretrained(tmp_path / "back")
    assert all(torch.equal(held, again.state_dict()[name]) for name, held in shards.state_dict().items())
    loaded, report = PI0ForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    wanted = peer.state_dict()
    for name, held in loaded.state_dict().items():
        assert name == "model.dit.embed_tokens.weight" or torch.equal(held, wanted[name]), name


OLD = {
    ".paligemma.model.language_model": ".paligemma.language_model.model",
    ".paligemma.lm_head": ".paligemma.language_model.lm_head",
    ".paligemma.model": ".paligemma",
}
SPELLED = {
    "openpi": lambda name: name.removeprefix("model."),
    "transformers 4.51": lambda name: re.sub(
        r"\.paligemma\.(?:model\.language_model|lm_head|model)",
        lambda found: OLD[found[0]],
        name,
    ),
    "no vision_model": lambda name: name.replace(".vision_model.", "."),
}


@pytest.mark.parametrize("spelling", [*SPELLED, "both tables", "transformers 5", "with scales"])
def test_other_spellings(model, peer, folder, tmp_path, spelling):
    (tmp_path / "config.json").write_text(json.dumps(PLAIN))
    held = load_file(folder / "model.safetensors")
    if spelling == "transformers 5":
        peer.save_pretrained(tmp_path)
    elif spelling == "both tables":
        table = held["model.paligemma_with_expert.paligemma.lm_head.weight"].clone()
        held["model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"] = table
        save_file(held, tmp_path / "model.safetensors")
    elif spelling == "with scales":
        named = {SPELLED["transformers 4.51"](name): tensor for name, tensor in held.items()}
        kinds = ("normalize_inputs.buffer_observation_state", "normalize_targets.buffer_action")
        scales = {f"{kind}.{name}": torch.ones(4) for kind in kinds for name in ("mean", "std")}
        save_file(named | scales, tmp_path / "model.safetensors")
    else:
        named = {SPELLED[spelling](name): tensor for name, tensor in held.items()}
        assert named.keys() != held.keys()
        save_file(named, tmp_path / "model.safetensors")
    again = omnimoe.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda held: held.pop("model.state_proj.bias"), r"state_proj\.bias.*without these parts"),
        (lambda held: held.update({"model.action_in_proj.scale": torch.ones(3)}), r"action_in_proj\.scale"),
        (
            lambda held: held.update({"model.state_proj.weight": torch.ones(4, 4)}),
            r"state_proj\.weight.*models of different sizes",
        ),
        (
            lambda held: held.update({"model.time_mlp_in.weight": held.pop("model.action_time_mlp_in.weight")}),
            r"Likely cause: renamed: model\.time_mlp_in\.weight for model\.action_time_mlp_in\.weight",
        ),
    ],
    ids=["missing", "extra", "shape", "renamed"],
)
def test_a_file_that_does_not_fit(folder, tmp_path, change, told):
    (tmp_path / "config.json").write_text(json.dumps(PLAIN))
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(MisfitError, match=f"(?s){told}"):
        omnimoe.from_pretrained(tmp_path)


def test_the_published_list_at_full_size(tmp_path):
    """Every name and shape that transformers' class has under the published names loads, and is given back."""
    plain = spelled_out({"type": "pi0"})
    read = {key: value for key, value in plain.items() if key != "model_type"}
    from transformers import PI0Config

    with torch.device("meta"):
        whole = PI0ForConditionalGeneration(PI0Config(**read))
    wanted = {published_name(name): tuple(held.shape) for name, held in whole.state_dict().items()}
    assert len(wanted) == 777
    assert sum(math.prod(shape) for shape in wanted.values()) == 3_501_372_176
    model = omnimoe.load("pi0", device="meta")
    found = PI0.plan(model).published
    assert {**found, **PI0.filled(model.config)} == wanted
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_238_048_528
    loaded = loads_and_saves("pi0", wanted, tmp_path)
    assert {name: held.shape for name, held in loaded.state_dict().items()} == {
        name: held.shape for name, held in model.state_dict().items()
    }
    lacking = wanted.pop("model.action_time_mlp_in.weight")
    (tmp_path / "renamed").mkdir()
    with pytest.raises(MisfitError, match=r"renamed: model\.time_mlp_in\.weight for model\.action_time"):
        omnimoe.from_pretrained(
            write_hollow(tmp_path / "renamed", "pi0", {**wanted, "model.time_mlp_in.weight": lacking}), device="meta"
        )


def test_configs_of_lerobot_and_openpi(tmp_path):
    openpi = {"action_dim": 32, "action_horizon": 10, "paligemma_variant": "gemma_2b", "precision": "bfloat16"}
    for plain, chunk in (({"type": "pi0", "chunk_size": 50}, 50), (openpi, 10)):
        assert is_pi0(plain)
        (tmp_path / "config.json").write_text(json.dumps(plain))
        assert find_converter(tmp_path) is PI0
        config = PI0.config_of(plain)
        assert config.modalities[3].num_tokens == chunk
        assert config.replace(modalities=pi0().modalities).to_dict() == pi0().replace(mask="block_causal").to_dict()
    for other in ({"type": "pi05"}, {"type": "act"}, {**openpi, "pi05": True}, {"action_horizon": 16}, {}):
        assert not is_pi0(other)
    with pytest.raises(omnimoe.CheckpointError, match="gemma_9b"):
        PI0.config_of({"type": "pi0", "paligemma_variant": "gemma_9b"})
    wrong = json.loads(json.dumps(PLAIN))
    wrong["dit_config"]["head_dim"] = 16
    with pytest.raises(omnimoe.CheckpointError, match="head_dim is 8 in the language tower and 16"):
        PI0.config_of(wrong)
