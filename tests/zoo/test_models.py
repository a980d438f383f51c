"""Every registered model: declared, counted against the papers and its card, and run in a shrunk copy."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

from omnimoe import OmniMoeConfig, OmniMoeForCausalLM, from_pretrained, list_models, load, model_info, shrink
from omnimoe.encoders import Features
from omnimoe.inputs import InputError
from omnimoe.layers.masks import generates_under
from omnimoe.model import MODELS
from omnimoe.tokenizers import TokenizerError, load_tokenizer

ZOO = Path(__file__).parents[2] / "zoo"
NAMES = sorted(set(list_models()) - set(list_models(family="custom")))
CARDS = sorted(ZOO.glob("*/README.md"))

# Millions of weights, as printed: Mixture-of-Transformers, table 1, dense, two towers, three towers, four experts.
MOT_TABLE = {
    "37m": (37.0, 40.4, 43.8, 44.0),
    "94m": (94.4, 121.7, 148.9, 151.0),
    "443m": (442.6, 750.9, 1059.2, 1065.5),
    "880m": (880.9, 1560.4, 2240.0, 2240.0),
    "1_5b": (1501.7, 2734.9, 3968.1, 3993.3),
    "7b": (7013.2, 13489, 19966, 19999),
}
# The same paper, table 4: dense, two towers; without the linear maps of the patches and the two markers.
TRANSFUSION_TABLE = {
    "163m": (162.4, 275.7),
    "760m": (777.9, 1457.4),
    "1_4b": (1364.3, 2597.5),
    "7b": (6738.4, 13215),
}
# MoMa, table 1: the formula of dense and of eight experts, then the paper's own rounding of eight experts.
MOMA_TABLE = {
    "90m": (92.3, 209.7, (210, 1)),
    "435m": (436.2, 1845, (1900, 100)),
    "1_4b": (1476, 7114, (7100, 100)),
}


def config_of(name: str) -> OmniMoeConfig:
    return MODELS.get(name)()


def last_digit(number: float) -> float:
    """One unit of the last digit that the table prints."""
    return 0.1 if isinstance(number, float) else 1


def assert_printed_as(params: int, number: float) -> None:
    assert abs(params / 1e6 - number) <= last_digit(number)


def batch_of(config: OmniMoeConfig, batch_size: int = 2, length: int = 24) -> dict:
    """Random ids, spans of every modality among them, and what continuous modalities need."""
    ids = torch.randint(16, 60, (batch_size, length))  # above the special ones of a small copy
    batch = {"input_ids": ids}
    for place, modality in enumerate(config.modalities[1:], start=1):
        span = slice(4 * place, 4 * place + 4)
        if modality.is_discrete:
            owned = config.token_ranges[modality.name]
            ids[:, span] = torch.randint(owned.start, owned.stop, (batch_size, 4))
            continue
        ids[:, span] = modality.placeholder_id
        features = batch.setdefault("features", {})
        if modality.is_input_only:
            rows, places = torch.randn(batch_size, 4, modality.channels), torch.tensor([[0, 1, 8, 9]] * batch_size)
            features[modality.name] = Features(rows=rows, pooled=rows.mean(1), places=places)
            continue
        shape = (batch_size, 2, 2) if modality.has_own_form else (4 * batch_size,)
        features[modality.name] = torch.randn(*shape, modality.channels)
        batch.setdefault("timesteps", {})[modality.name] = torch.rand(shape[0])
        batch.setdefault("targets", {})[modality.name] = torch.randn(*shape, modality.channels)
    return batch


def test_there_are_models():
    assert len(NAMES) >= 67
    assert {model_info(name).family for name in NAMES} >= {"chameleon", "mot", "transfusion", "moma", "moe", "nano"}


@pytest.mark.parametrize("name", NAMES)
def test_builds_without_memory(name):
    model = load(name, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == model_info(name).total_params


@pytest.mark.parametrize("name", NAMES)
def test_the_card_agrees(name):
    info = model_info(name)
    rows = [row for card in CARDS for row in table_rows(card) if row["name"] == name]
    assert len(rows) == 1, "a model stands in the sizes table of one card"
    assert rows[0] == {
        "name": name,
        "total": f"{info.total_params / 1e6:,.1f}",
        "active": f"{info.active_params / 1e6:,.1f}",
        "gflop": f"{info.flops_per_token / 1e9:.3f}",
    }
    assert info.description
    assert info.paper.startswith("https://")
    assert info.paper not in info.related
    assert all(paper.startswith("https://") for paper in info.related)
    assert info.license


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_a_card_names_registered_models_only(card):
    assert {row["name"] for row in table_rows(card)} <= set(NAMES)


def table_rows(card: Path) -> list[dict[str, str]]:
    """Rows ``| `name` | ... | total | active | GFLOP |`` of a card."""
    found = []
    for line in card.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if re.fullmatch(r"`[a-z0-9_.\-]+`", cells[0]) and len(cells) >= 4:
            total, active, gflop = cells[-3:]
            found.append({"name": cells[0].strip("`"), "total": total, "active": active, "gflop": gflop})
    return found


@pytest.mark.parametrize("size", MOT_TABLE)
def test_counts_of_mixture_of_transformers(size):
    dense, two, three, four_experts = MOT_TABLE[size]
    twin = "chameleon_7b.twin" if size == "7b" else f"chameleon_{size}"
    assert_printed_as(model_info(twin).total_params, dense)
    assert_printed_as(model_info(f"chameleon_{size}_speech").total_params, dense)
    assert_printed_as(model_info(f"mot_{size}").total_params, two)
    assert_printed_as(model_info(f"mot_{size}_speech").total_params, three)
    assert_printed_as(model_info(f"moe4x_{size}").total_params, four_experts)
    for name in (f"mot_{size}", f"mot_{size}_speech"):
        assert set(model_info(name).active_params_by_modality.values()) == {model_info(twin).total_params}, (
            "a token of a tower meets what it would meet in the dense model"
        )


@pytest.mark.parametrize("size", TRANSFUSION_TABLE)
def test_counts_of_transfusion(size):
    for name, number in zip((f"transfusion_{size}", f"mot_transfusion_{size}"), TRANSFUSION_TABLE[size], strict=True):
        config = config_of(name)
        ours = config.modalities[1].active_params(config.hidden_size) + 2 * 2 * config.hidden_size
        assert_printed_as(model_info(name).total_params - ours, number)


@pytest.mark.parametrize("size", MOMA_TABLE)
def test_counts_of_moma(size):
    dense, eight, (paper, unit) = MOMA_TABLE[size]
    assert_printed_as(model_info(f"chameleon_{size}").total_params, dense)
    for name in (f"moe_{size}_8x", *(f"moma_{size}_{groups}" for groups in ("4t4i", "7t1i", "6t2i"))):
        assert_printed_as(model_info(name).total_params, eight)
        assert abs(model_info(name).total_params / 1e6 - paper) <= unit
    config = config_of(f"chameleon_{size}")
    for groups, experts in (("1t1i", 2), ("2t2i", 4)):
        formula = config.num_layers * (4 + 8 * experts) * config.hidden_size**2 + 2 * 65_536 * config.hidden_size
        assert model_info(f"moma_{size}_{groups}").total_params == pytest.approx(formula, rel=1e-3)


@pytest.mark.parametrize(("size", "millions"), [("90m", 316.7), ("435m", 2986), ("1_4b", 11_853)])
def test_counts_of_moma_with_depths(size, millions):
    name, dense = f"momad_{size}_4t4i", f"chameleon_{size}"
    assert model_info(name).total_params / 1e6 == pytest.approx(millions, abs=1)
    assert model_info(name).flops_per_token == pytest.approx(model_info(dense).flops_per_token, rel=0.02)
    works = [block.depth is not None for block in config_of(name).blocks]
    assert works == [layer % 2 == 0 for layer in range(len(works))], "every second layer, from the first"


@pytest.mark.parametrize("size", ["pico", "nano", "micro"])
def test_small_models_meet_equal_weights(size):
    dense = model_info(f"dense_{size}")
    assert dense.total_params == pytest.approx({"pico": 0.8e6, "nano": 3e6, "micro": 10e6}[size], rel=0.05)
    assert model_info(f"mot_{size}").active_params == dense.active_params == dense.total_params
    for name in (f"moma_{size}", f"moe_{size}"):
        config, info = config_of(name), model_info(name)
        router = config.experts.router.router_params(config.hidden_size, config.experts.num_experts, 0)
        assert info.active_params - dense.active_params == config.num_layers * router
        assert info.active_params < 1.01 * dense.active_params
        assert info.is_causal


@pytest.mark.parametrize(
    ("tokenizer", "constant"), [("text", "TEXT_SIZE"), ("picture", "IMAGE_SIZE"), ("speech", "SPEECH_SIZE")]
)
def test_small_models_fit_the_tokenizers(tokenizer, constant):
    nano = importlib.import_module("omnimoe.zoo.nano")
    try:
        found = load_tokenizer(tokenizer)
    except TokenizerError as error:
        pytest.skip(f"no weights: {error}")
    assert found.vocab_size == getattr(nano, constant)
    if tokenizer == "picture":
        assert found.num_tokens == nano.IMAGE_TOKENS


@pytest.mark.parametrize("name", NAMES)
def test_config_round_trip(name):
    config = config_of(name)
    again = OmniMoeConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.blocks == config.blocks
    assert again.modalities == config.modalities


@pytest.mark.parametrize("name", NAMES)
def test_markers_are_text_of_their_own(name):
    config = config_of(name)
    ids = [getattr(modality, role) for modality in config.modalities for role in ("begin_id", "end_id")]
    ids = [
        token for token in (*ids, config.pad_token_id, config.bos_token_id, config.eos_token_id) if token is not None
    ]
    assert config.published or len(set(ids)) == len(ids), "some published models end a document as they begin it"
    assert set(config.modality_of_ids()[ids].tolist()) == {0}


@pytest.mark.parametrize("name", NAMES)
def test_a_small_copy_steps_saves_and_generates(name, tmp_path):
    config = shrink(config_of(name))
    model = OmniMoeForCausalLM(config)
    batch = batch_of(config)
    out = model(**batch, labels=batch["input_ids"])
    out.loss.backward()
    assert out.loss.isfinite()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    without = [key for key, parameter in trained.items() if parameter.grad is None]
    assert without == [], "every weight takes part in every step"
    assert all(parameter.grad.isfinite().all() for parameter in trained.values())
    model.update_routers(out.routings)

    model.eval().save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert {key: tensor.shape for key, tensor in again.state_dict().items()} == {
        key: tensor.shape for key, tensor in model.state_dict().items()
    }
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        for parameter in again.parameters():
            # A mapped file has another alignment, for which a matrix library may pick a kernel that rounds otherwise.
            parameter.data = parameter.data.clone()
        assert torch.equal(model(**batch).logits, again(**batch).logits)

    prompt = batch["input_ids"] if "features" not in batch else torch.randint(16, 60, (2, 6))
    if not generates_under(model.config.mask) or not all(block.has_causal_form for block in config.blocks):
        with pytest.raises(InputError, match="does not generate"):
            model.generate(prompt, max_new_tokens=4)
        return
    made = model.generate(
        prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert made.sequences.shape == (2, prompt.shape[1] + 4)
    if config.is_causal:
        with torch.no_grad():
            logits = model(made.sequences[:, :-1]).logits[:, prompt.shape[1] - 1 :]
        torch.testing.assert_close(torch.stack(made.logits, dim=1), logits.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if config_of(name).is_causal])
def test_a_causal_model_does_not_see_the_future(name):
    config = shrink(config_of(name))
    model = OmniMoeForCausalLM(config).eval()
    batch = batch_of(config)
    ids, given = batch["input_ids"], batch.get("features", {})
    seen = {"features": {name: given[name] for name in config.input_only}}  # what only enters must, where it stands
    changed = ids.clone()
    changed[:, 14:] = (changed[:, 14:] + 5).clamp(max=config.vocab_size - 1)
    with torch.no_grad():
        found, wanted = (model(held, **seen).logits[:, :14] for held in (ids, changed))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("untied", "dense"), [("mot_37m", "chameleon_37m"), ("mot_nano", "dense_nano")])
def test_equal_towers_are_the_dense_twin(untied, dense):
    towers = OmniMoeForCausalLM(shrink(config_of(untied))).eval()
    twin = OmniMoeForCausalLM(shrink(config_of(dense))).eval()
    with torch.no_grad():
        held = dict(twin.named_parameters())
        for key, parameter in towers.named_parameters():
            parameter.copy_(held[key].expand_as(parameter))
        ids = batch_of(twin.config)["input_ids"]
        torch.testing.assert_close(towers(ids).logits, twin(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["moma_nano", "moe_nano"])
def test_routers_of_small_models_learn_from_the_prediction(name):
    """With one expert a token the norm after it would divide the gate away."""
    config = shrink(config_of(name))
    router = config.experts.router
    silent = {"load_balance_coef": 0.0}
    router = router.replace(router=router.router.replace(**silent)) if name == "moma_nano" else router.replace(**silent)
    model = OmniMoeForCausalLM(config.replace(experts=config.experts.replace(router=router)))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".experts." in key:
                parameter.mul_(10)
    ids = batch_of(config)["input_ids"]
    model(ids, labels=ids).loss.backward()
    for key, parameter in model.named_parameters():
        if "scorer" in key:
            assert parameter.grad.norm() > 1e-3, key
