"""BAGEL at a tiny size: our model gives what its formulas give, and its files are read and written to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import omnimoe
from omnimoe.convert import to_published
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.zoo.bagel import BAGEL, bagel_7b_mot
from tests.zoo.bagel import oracle
from tests.zoo.bagel.documents import LLM, VIT, Latent, batch, documents, tokens


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


def close(found: torch.Tensor, wanted: torch.Tensor, bound: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    error = float((found.double() - wanted).norm() / wanted.norm())
    assert error < bound, error


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


def test_gradients(model, folder):
    """Of a loss over logits and velocities, in the published tensors of each part."""
    document = documents()[1]
    given = batch(model, [document])
    weights = {name: held.double().requires_grad_() for name, held in load_file(folder / "ema.safetensors").items()}
    logits, velocities = oracle.run(weights, document)
    mix = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ((logits * mix).mean() + sum(velocity.square().sum() for velocity in velocities)).backward()
    held = OmniMoeForCausalLM(model.config)
    held.load_state_dict(model.state_dict())
    out = held(**given)
    ((out.logits[0].double() * mix).mean() + out.predictions["image"].double().square().sum()).backward()
    plan = BAGEL.plan(held)
    scale = max(float(held.grad.norm()) for held in weights.values() if held.grad is not None)
    named = dict(held.named_parameters())
    compared = 0
    for piece in plan.pieces:
        wanted, found = weights[piece.published].grad, named[piece.ours].grad
        if not named[piece.ours].requires_grad or wanted is None:
            continue
        # an encoder's key bias shifts all scores of a query alike, so its gradient is rounding and nothing else
        wanted = piece.change.into(wanted)
        assert (piece.place(found) - wanted).norm() < 2e-5 * wanted.norm() + 1e-8 * scale, piece.published
        compared += 1
    assert compared > 60


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


def test_a_copy_that_only_draws_loads_with_a_report(folder, tmp_path, caplog):
    held = load_file(folder / "ema.safetensors")
    drawing = {name: tensor for name, tensor in held.items() if not name.startswith(("vit_", "connector."))}
    save_file(drawing, tmp_path / "ema.safetensors")
    for name in ("llm_config.json", "vit_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    omnimoe.from_pretrained(tmp_path)
    assert f"lacks {len(held) - len(drawing)} tensors that it may lack" in caplog.text


def test_a_missing_tensor_of_a_tower_is_named(folder, tmp_path):
    held = load_file(folder / "ema.safetensors")
    held.pop("language_model.model.layers.1.mlp_moe_gen.up_proj.weight")
    save_file(held, tmp_path / "ema.safetensors")
    for name in ("llm_config.json", "vit_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    with pytest.raises(omnimoe.CheckpointError, match=r"mlp_moe_gen\.up_proj\.weight"):
        omnimoe.from_pretrained(tmp_path)


def test_full_size_is_the_published_list():
    """Counts of the published file; its size in bytes, 29,214,685,336, follows from them."""
    with torch.device("meta"):
        plan = BAGEL.plan(OmniMoeForCausalLM(bagel_7b_mot()))
    assert len(plan.published) == 1223
    assert sum(torch.Size(shape).numel() for shape in plan.published.values()) == 14_607_260_128
    assert plan.published["vit_pos_embed.pos_embed"] == (4900, 3584)
    assert plan.published["language_model.model.layers.27.self_attn.k_proj_moe_gen.bias"] == (512,)
    drawing = [name for name in plan.published if not name.startswith(("vit_model.", "connector.", "vit_pos_embed."))]
    assert len(plan.published) - len(drawing) == 426
