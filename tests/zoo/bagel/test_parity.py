"""BAGEL at a tiny size: our model gives what its formulas give, and its files are read and written to the bit."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import omnimoe
from omnimoe.blocks import block_ids_of, block_positions
from omnimoe.convert import to_published
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.zoo.bagel import BAGEL, bagel_7b_mot
from tests.zoo.bagel import oracle
from tests.zoo.bagel.documents import LLM, VIT, Latent, Seen, Text, batch, documents, tokens
from tests.zoo.hollow import loads_and_saves, refuses
from tests.zoo.weights import close


@pytest.fixture(scope="module")
def model() -> OmniMoeForCausalLM:
    torch.manual_seed(0)
    made = OmniMoeForCausalLM(BAGEL.config_of({"llm_config.json": LLM, "vit_config.json": VIT})).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not name.endswith("place.weight"):  # fixed tables stay what they are
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
    return made


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    made = tmp_path_factory.mktemp("published") / "bagel"
    to_published(model, made)
    (made / "config.json").write_text('{"model_type": "bagel",}')  # as one published copy has it
    return made


@pytest.fixture(scope="module")
def weights(folder) -> dict[str, torch.Tensor]:
    return {name: held.double() for name, held in load_file(folder / "ema.safetensors").items()}


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_of_interleaved_documents(model, weights, side):
    held = documents()
    with torch.no_grad():
        out = model(**batch(model, held, side))
    length, start = out.logits.shape[1], 0
    for row, document in enumerate(held):
        logits, velocities = oracle.run(weights, document)
        count = len(tokens(document))
        mine = out.logits[row, :count] if side == "right" else out.logits[row, length - count :]
        close(mine, logits)
        for velocity in velocities:
            close(out.predictions["image"][start : start + len(velocity)], velocity)
            start += len(velocity)
    assert start == len(out.predictions["image"])


@pytest.mark.parametrize("lacking", ["Seen", "Latent"])
def test_a_batch_without_one_kind_of_picture(model, weights, lacking):
    held = [[part for part in document if type(part).__name__ != lacking] for document in documents(1)]
    held = [document for document in held if document]
    with torch.no_grad():
        out = model(**batch(model, held))
    for row, document in enumerate(held):
        logits, _ = oracle.run(weights, document)
        close(out.logits[row, : len(logits)], logits)


@torch.no_grad()
@pytest.mark.parametrize("lacking", [(), (Seen,), (Latent,)], ids=["mixed", "nothing seen", "nothing drawn"])
def test_words_one_by_one_after_pictures(model, weights, lacking):
    """A padded batch into a cache, its last words token by token; what was drawn is a condition, without noise."""
    held = [[part for part in document if not isinstance(part, lacking)] for document in documents()[:3]]
    held = [[Latent(part.rows) if isinstance(part, Latent) else part for part in document] for document in held]
    held = [[*document, Text([22, 23])] for document in held]
    given = batch(model, held, "left")
    ids, mask = given.pop("input_ids"), given.pop("attention_mask")
    positions = block_positions(block_ids_of(model.config, model.model.modality_ids_of(ids), ids), mask.bool())
    length, cache, found = ids.shape[1], None, []
    for start, stop in itertools.pairwise([0, *range(length - 3, length + 1)]):
        piece = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        out = model(ids[:, start:stop], **piece, **given, past_key_values=cache, use_cache=True)
        cache, given = out.past_key_values, {}
        found.append(out.logits)
    logits = torch.cat(found, dim=1)
    for row, document in enumerate(held):
        wanted, _ = oracle.run(weights, document)
        close(logits[row, -len(wanted) :], wanted)


HELD = {
    "a padded batch": (documents()[1:3], "left"),
    "nothing seen": ([[part for part in held if not isinstance(part, Seen)] for held in documents()[:2]], "right"),
    "nothing drawn": ([[part for part in held if not isinstance(part, Latent)] for held in documents()[:3]], "right"),
}


@pytest.mark.parametrize(("held", "side"), HELD.values(), ids=HELD)
def test_gradients(model, folder, held, side):
    """Of a loss over logits and velocities, in the published tensors of each part."""
    weights = {name: tensor.double().requires_grad_() for name, tensor in load_file(folder / "ema.safetensors").items()}
    ours = OmniMoeForCausalLM(model.config)
    ours.load_state_dict(model.state_dict())
    out = ours(**batch(ours, held, side))
    generator = torch.Generator().manual_seed(3)
    theirs, mine = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row, document in enumerate(held):
        logits, velocities = oracle.run(weights, document)
        mix = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        at = slice(0, len(logits)) if side == "right" else slice(-len(logits), None)
        theirs = theirs + (logits * mix).mean() + sum(velocity.square().sum() for velocity in velocities)
        mine = mine + (out.logits[row, at].double() * mix).mean()
    if out.predictions:
        mine = mine + out.predictions["image"].double().square().sum()
    theirs.backward()
    mine.backward()
    plan = BAGEL.plan(ours)
    scale = max(float(tensor.grad.norm()) for tensor in weights.values() if tensor.grad is not None)
    named = dict(ours.named_parameters())
    compared = 0
    for piece in plan.pieces:
        wanted, found = weights[piece.published].grad, named[piece.ours].grad
        if not named[piece.ours].requires_grad:
            continue
        if wanted is None:
            assert found is None or not piece.place(found).any(), piece.published
            continue
        # an encoder's key bias shifts all scores of a query alike, so its gradient is rounding and nothing else
        wanted = piece.change.into(wanted)
        assert (piece.place(found) - wanted).norm() < 1e-5 * wanted.norm() + 1e-8 * scale, piece.published
        compared += 1
    assert compared > 30


def test_losses_are_of_noised_pictures_alone(model):
    """A clean picture is a condition: nothing is predicted at its rows."""
    held = documents()
    given = batch(model, held)
    latents = [part for document in held for part in document if isinstance(part, Latent)]
    targets = [torch.randn_like(part.rows) for part in latents]
    with torch.no_grad():
        out = model(**given, targets={"image": targets})
    each = [
        (rows - target.flatten(0, 1)).square().mean(-1)
        for rows, target in zip(
            out.predictions["image"].split([len(target.flatten(0, 1)) for target in targets]), targets, strict=True
        )
    ]
    noised = torch.cat([loss for loss, part in zip(each, latents, strict=True) if part.time > 0])
    assert int(out.counts["image"]) == len(noised)
    assert torch.allclose(out.losses["image"], noised.mean())


def test_the_published_files_are_read_and_written_to_the_bit(model, folder, tmp_path):
    loaded = omnimoe.from_pretrained(folder)
    for name, held in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], held), name
    to_published(loaded, tmp_path / "again")
    first, second = (load_file(place / "ema.safetensors") for place in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((tmp_path / "again" / "llm_config.json").read_text())["hidden_size"] == LLM["hidden_size"]


def partial(folder: Path, place: Path, lacks, vit: bool = True) -> Path:
    """A copy without some tensors, and without the config of the vision encoder."""
    place.mkdir(exist_ok=True)
    held = {name: tensor for name, tensor in load_file(folder / "ema.safetensors").items() if not lacks(name)}
    save_file(held, place / "ema.safetensors")
    for name in ("llm_config.json", "vit_config.json")[: 1 + vit]:
        (place / name).write_text((folder / name).read_text())
    return place


def is_sight(name: str) -> bool:
    return name.startswith(("vit_", "connector."))


def test_a_copy_that_only_draws_loads_with_a_report(model, folder, tmp_path, caplog):
    blind = partial(folder, tmp_path / "blind", is_sight)
    loaded = omnimoe.from_pretrained(blind)
    held, drawing = (load_file(place / "ema.safetensors") for place in (folder, blind))
    count = len(held) - len(drawing) - 1
    assert f"has no vision tower, which it may lack: what its {count} tensors give is fresh" in caplog.text
    assert "has no table of places for seen pictures" in caplog.text
    table = "model.modalities.vision.place.weight"
    assert torch.equal(loaded.state_dict()[table], model.state_dict()[table]), "a fixed table, made anew"
    to_published(loaded, tmp_path / "again")
    again = load_file(tmp_path / "again" / "ema.safetensors")
    assert again.keys() == drawing.keys()
    assert all(torch.equal(again[name], drawing[name]) for name in again)


def test_the_table_of_places_may_be_missing_alone(model, folder, tmp_path):
    loaded = omnimoe.from_pretrained(partial(folder, tmp_path / "copy", lambda name: name.startswith("vit_pos")))
    assert all(torch.equal(held, loaded.state_dict()[name]) for name, held in model.state_dict().items())


@pytest.mark.parametrize("table", [False, True])
def test_a_copy_that_only_draws_without_a_vision_config(folder, tmp_path, table, caplog):
    """Then the published one stands in, whether its ``config.json`` is there or not."""
    copy = partial(folder, tmp_path / "copy", is_sight, vit=False)
    if table:
        (copy / "config.json").write_text('{"model_type": "bagel",}')
    loaded = omnimoe.from_pretrained(copy, device="meta")
    assert "has no vit_config.json; that of the published model stands in" in caplog.text
    assert loaded.config.modalities[1] == bagel_7b_mot().modalities[1]
    assert loaded.config.hidden_size == LLM["hidden_size"]
    (copy / "ema.safetensors").unlink()
    with pytest.raises(omnimoe.CheckpointError, match=r"no ema\.safetensors"):
        omnimoe.from_pretrained(copy, device="meta")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("language_model.model.layers.1.mlp_moe_gen.up_proj.weight", "a file of the checkpoint is missing"),
        ("vit_model.vision_model.encoder.layers.0.self_attn.q_proj.weight", "may lack the vision tower as a whole"),
        ("connector.fc1.weight", "may lack the vision tower as a whole, and holds some of it"),
    ],
)
def test_a_missing_tensor_is_named(folder, tmp_path, name, cause):
    copy = partial(folder, tmp_path / "copy", lambda held: held == name)
    with pytest.raises(omnimoe.CheckpointError, match=rf"1 missing:\n  {re.escape(name)}\nLikely cause: .*{cause}"):
        omnimoe.from_pretrained(copy)


def test_full_size_is_the_published_list(tmp_path):
    """Counts of the published file; its size in bytes, 29,214,685,336, follows from them."""
    keys = published_list()
    assert len(keys) == 1223
    assert sum(torch.Size(shape).numel() for shape in keys.values()) == 14_607_260_128
    assert sum(is_sight(name) for name in keys) == 426
    model = loads_and_saves("bagel_7b_mot", keys, tmp_path)
    assert BAGEL.plan(model).published == keys


@pytest.mark.parametrize(
    ("changed", "other"),
    [
        (
            "language_model.model.layers.27.mlp_moe_gen.down_proj.weight",
            "language_model.model.layers.27.mlp_gen.weight",
        ),
        ("llm2vae.weight", "llm_to_vae.weight"),
    ],
)
def test_a_key_that_does_not_fit_is_named_at_full_size(tmp_path, changed, other):
    refuses("bagel_7b_mot", published_list(), tmp_path, changed, other)


def published_list() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published file, from its table and not from our rules."""
    wide, inner, keys, seen, seen_inner = 3584, 18_944, 512, 1152, 4304
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = (out, into)
        if bias:
            found[f"{name}.bias"] = (out,)

    for name in ("language_model.model.embed_tokens", "language_model.lm_head"):
        linear(name, 152_064, wide, bias=False)
    for suffix in ("", "_moe_gen"):
        found[f"language_model.model.norm{suffix}.weight"] = (wide,)
        for index in range(28):
            layer = f"language_model.model.layers.{index}"
            linear(f"{layer}.self_attn.q_proj{suffix}", wide, wide)
            for site in ("k_proj", "v_proj"):
                linear(f"{layer}.self_attn.{site}{suffix}", keys, wide)
            linear(f"{layer}.self_attn.o_proj{suffix}", wide, wide, bias=False)
            for site in ("gate_proj", "up_proj"):
                linear(f"{layer}.mlp{suffix}.{site}", inner, wide, bias=False)
            linear(f"{layer}.mlp{suffix}.down_proj", wide, inner, bias=False)
            for norm in ("q_norm", "k_norm"):
                found[f"{layer}.self_attn.{norm}{suffix}.weight"] = (128,)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{layer}.{norm}{suffix}.weight"] = (wide,)
    linear("time_embedder.mlp.0", wide, 256)
    linear("time_embedder.mlp.2", wide, wide)
    linear("vae2llm", wide, 64)
    linear("llm2vae", 64, wide)
    linear("connector.fc1", wide, seen)
    linear("connector.fc2", wide, wide)
    found |= {"latent_pos_embed.pos_embed": (4096, wide), "vit_pos_embed.pos_embed": (4900, wide)}
    tower = "vit_model.vision_model"
    linear(f"{tower}.embeddings.patch_embedding", seen, 588)
    found[f"{tower}.embeddings.position_embedding.weight"] = (4900, seen)
    for index in range(26):
        layer = f"{tower}.encoder.layers.{index}"
        for site in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}.self_attn.{site}", seen, seen)
        linear(f"{layer}.mlp.fc1", seen_inner, seen)
        linear(f"{layer}.mlp.fc2", seen, seen_inner)
        for norm in ("layer_norm1", "layer_norm2"):
            found |= {f"{layer}.{norm}.{kind}": (seen,) for kind in ("weight", "bias")}
    return found | {f"{tower}.post_layernorm.{kind}": (seen,) for kind in ("weight", "bias")}
