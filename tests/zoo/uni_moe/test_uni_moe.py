"""The language models of Uni-MoE against a loop over published names, and their files to the bit."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from safetensors.torch import load_file

import omnimoe
from omnimoe.checkpoint import CheckpointError
from omnimoe.checkpoint.errors import MisfitError
from omnimoe.convert import find_converter, to_omnimoe, to_published
from omnimoe.zoo.uni_moe.convert import KEPT, UNI_MOE, UNI_MOE_2
from tests.zoo.hollow import loads_and_saves
from tests.zoo.uni_moe.oracle import TINY, TINY_2, chosen_of, logits_of, names
from tests.zoo.weights import close, gradients_of, published_of, random_model, write_folder

FAMILIES = {"first": (UNI_MOE, TINY), "second": (UNI_MOE_2, TINY_2)}
LENGTHS = (9, 5, 2)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    converter, plain = FAMILIES[request.param]
    model = random_model(converter, plain)
    with torch.no_grad():  # so that tokens differ in how many experts they take, and some logits come near others
        for layer in model.model.backbone.layers:
            layer.mlp.router.scorer.weight.mul_(2.0)
            layer.mlp.router.scorer.weight[1].copy_(layer.mlp.router.scorer.weight[0] * 1.002)
    return converter, plain, model


@pytest.fixture(scope="module")
def weights(family):
    return published_of(family[0], family[2])


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of several lengths, padded in front and behind."""
    ids = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, :4], mask[2, 2:] = 0, 0
    return ids, mask


def test_logits(family, weights):
    _, plain, model = family
    ids, mask = batch()
    doubles = {name: held.double() for name, held in weights.items()}
    with torch.no_grad():
        out = model(ids, attention_mask=mask)
    for row in range(3):
        words = ids[row][mask[row].bool()]
        wanted = logits_of(doubles, plain, doubles["model.embed_tokens.weight"][words])
        close(out.logits[row][mask[row].bool()], wanted)


def test_the_router_is_put_to_work(family):
    """The batch has tokens that take several numbers of experts, null ones, and ties."""
    _, plain, model = family
    ids, mask = batch()
    with torch.no_grad():
        out = model(ids, attention_mask=mask)
    taken = out.routings[0].expert_ids.view(int(mask.sum()), -1)
    counts = set((taken >= 0).sum(1).tolist())
    if plain is TINY:
        assert counts == {2}
        return
    assert len(counts) > 1
    assert (taken == 4).any(), "the null expert"
    weights = out.routings[0].expert_weights.view_as(taken)
    uneven = [row[:2] for row, ids_of in zip(weights, taken, strict=True) if set(ids_of[:2].tolist()) == {0, 1}]
    assert uneven, "experts near each other are chosen together"
    assert all(float(first / second) < 0.8 for first, second in uneven), "the first shares its part with the second"
    several = [row[row > 0] for row in weights if int((row > 0).sum()) > 1]
    assert any(torch.allclose(row, row[:1].expand_as(row)) for row in several), "others apart count alike"
    logits = out.routings[0].router_logits[0].tolist()
    assert [place for place in taken[0].tolist() if place >= 0] == chosen_of(logits, 0.7)


def test_gradients(family, weights):
    """Of every published tensor, on padded batches; without the balance loss."""
    converter, plain, model = family
    ids, mask = batch()
    real = mask.bool()
    factors = torch.randn(3, 9, 50, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (model(ids, attention_mask=mask).logits * factors)[real].sum().backward()
    leaves = {name: held.double().requires_grad_() for name, held in weights.items()}
    for row in range(3):
        words = ids[row][real[row]]
        logits = logits_of(leaves, plain, leaves["model.embed_tokens.weight"][words])
        (logits * factors[row][real[row]]).sum().backward()
    for name, found in gradients_of(converter, model).items():
        wanted = leaves[name].grad
        if wanted is None or not wanted.any():
            assert not found.any(), name
        elif name.endswith("k_proj.bias"):  # softmax does not see it
            assert float((found - wanted).norm()) < 1e-4
        else:
            close(found, wanted)


def test_cached_steps(family, weights):
    """Of a batch padded in front, the prompt and then word by word, as the loop has the whole."""
    _, plain, model = family
    ids, _ = batch()
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :2] = 0, 0
    doubles = {name: held.double() for name, held in weights.items()}
    parts, cache = [], None
    with torch.no_grad():
        for start, stop in itertools.pairwise((0, 5, 6, 7, 8, 9)):
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    found = torch.cat(parts, dim=1)
    for row in range(3):
        real = mask[row].bool()
        close(found[row][real], logits_of(doubles, plain, doubles["model.embed_tokens.weight"][ids[row][real]]))


def test_rows_of_a_tower_with_places_in_three_axes():
    """What the authors' towers give enters as embeddings, each with its time, row and column."""
    model = random_model(UNI_MOE_2, TINY_2)
    doubles = {name: held.double() for name, held in published_of(UNI_MOE_2, model).items()}
    made = torch.Generator().manual_seed(3)
    rows, positions = torch.randn(1, 6, 32, generator=made), torch.randint(0, 9, (1, 6, 3), generator=made)
    with torch.no_grad():
        found = model(inputs_embeds=rows, position_ids=positions).logits[0]
    close(found, logits_of(doubles, TINY_2, rows[0].double(), positions[0]))


def test_a_folder_to_the_bit(family, weights, tmp_path, caplog):
    converter, plain, model = family
    tower = {"model.vision_tower.weight": torch.randn(3, 2), "audio_aligner.bias": torch.randn(2)}
    folder = write_folder(tmp_path / "published", plain, weights | tower)
    assert find_converter(folder) is converter
    read = omnimoe.from_pretrained(folder)
    assert (
        f"2 tensors that are no part of a {converter.name} model: 1 of audio_aligner, 1 of vision_tower" in caplog.text
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    to_omnimoe(folder, tmp_path / "ours", converter, max_shard_size="40KB")
    (rest,) = KEPT.values()
    assert load_file(tmp_path / "ours" / rest).keys() == tower.keys()
    to_published(tmp_path / "ours", tmp_path / "theirs")
    back = load_file(tmp_path / "theirs" / "model.safetensors")
    assert back.keys() == {*weights, *tower}
    assert all(torch.equal(back[name], tensor) for name, tensor in (weights | tower).items())


def test_names_that_deepspeed_gives(tmp_path):
    model = random_model(UNI_MOE, TINY)
    weights = published_of(UNI_MOE, model)
    given = {name.replace(".experts.", ".deepspeed_moe.experts.deepspeed_experts."): w for name, w in weights.items()}
    assert given.keys() != weights.keys()
    read = omnimoe.from_pretrained(write_folder(tmp_path, TINY, given))
    assert all(torch.equal(read.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_what_does_not_fit_is_named(family, weights, tmp_path):
    _, plain, _ = family
    last = sorted(name for name in weights if name.endswith("down_proj.weight"))[-1]
    changes = ({last: None}, {"model.layers.7.mlp.gate.weight": torch.zeros(4, 32)}, {last: torch.zeros(1, 2)})
    for place, change in enumerate(changes):
        held = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
        with pytest.raises(MisfitError, match=next(iter(change))):
            omnimoe.from_pretrained(write_folder(tmp_path / str(place), plain, held))


def test_several_missing_experts_are_told_apart_and_a_prefix_is_seen(family, weights, tmp_path):
    _, plain, _ = family
    gone = [name for name in weights if ".layers.1." in name and re.search(r"experts\.[12]\.down_proj", name)]
    assert len(gone) == 2
    held = {name: tensor for name, tensor in weights.items() if name not in gone}
    with pytest.raises(MisfitError, match=r"(?s)2 missing:\n  model\.layers\.1\.mlp\..*experts\.{1-2}\.down_proj"):
        omnimoe.from_pretrained(write_folder(tmp_path / "gone", plain, held))
    held = {f"module.{name}": tensor for name, tensor in weights.items()}
    with pytest.raises(MisfitError, match=r"Likely cause: its names carry the prefix 'module\.'"):
        omnimoe.from_pretrained(write_folder(tmp_path / "prefix", plain, held))


@pytest.mark.parametrize(
    ("which", "change", "told"),
    [
        ("second", {"token_drop": True}, "token_drop is True"),
        ("second", {"rope_scaling": {"type": "yarn"}}, "rotary scaling 'yarn'"),
        ("second", {"mlp_dynamic_top_p": 1.5}, "top_p must lie above 0"),
        ("second", {"hidden_act": "mish"}, "'mish' has no counterpart"),
        ("first", {"attention_bias": True}, "attention_bias is True"),
        ("first", {"num_experts": None}, "malformed|does not fit"),
    ],
)
def test_what_is_not_converted_is_refused(which, change, told):
    converter, plain = FAMILIES[which]
    with pytest.raises(CheckpointError, match=told):
        converter.config_of({**plain, **change})


def test_a_fixed_number_of_experts_where_there_is_no_share():
    config = UNI_MOE_2.config_of({**TINY_2, "mlp_dynamic_top_p": 0, "mlp_fixed_expert_num": 0})
    router = config.experts.router
    assert (router.top_k, router.top_p, config.experts.num_shared_experts) == (2, None, 0)


@pytest.mark.parametrize(
    ("name", "billions"), [("uni_moe_4e", 19.72), ("uni_moe_8e", 37.04), ("uni_moe_2_omni", 26.15)]
)
def test_published_list_at_full_size(name, billions, tmp_path):
    """The names of the authors' code; of 2.0 the count that they print, 26B."""
    model = omnimoe.load(name, device="meta")
    converter = UNI_MOE_2 if name == "uni_moe_2_omni" else UNI_MOE
    found = converter.plan(model).published
    assert found == names(model.config.published["files"]["config.json"])
    loads_and_saves(name, found, tmp_path)
    assert sum(torch.Size(shape).numel() for shape in found.values()) / 1e9 == pytest.approx(billions, abs=0.005)
