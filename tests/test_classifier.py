"""A head over labels: on the last position, started from a language model, saved, reloaded, trained by the Trainer."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

import omnimoe
from omnimoe import (
    OmniMoeForCausalLM,
    OmniMoeForSequenceClassification,
    add_lora,
    export,
    flops,
    from_pretrained,
    load,
    lora_targets,
)
from omnimoe.checkpoint.errors import MisfitError
from omnimoe.inputs import InputError
from tests.declarations import DECLARATIONS, build, ids_like
from tests.refusals import refused

NAMES = ["dense_tied", "mot", "moe", "moma", "encoder", "transfusion"]


@pytest.fixture
def folder(tmp_path):
    """A language model."""
    build(DECLARATIONS["mot"]).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_from_a_language_model(name, tmp_path):
    config = DECLARATIONS[name]
    plain, ids = build(config), ids_like(config) + (ids_like(config) == 0)
    plain.save_pretrained(tmp_path)
    model, report = from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert type(model) is OmniMoeForSequenceClassification
    assert set(report["missing_keys"]) == {"score.weight"}
    assert (model.score.weight.shape, model.score.weight.std() > 0, model.training) == ((3, 16), True, False)
    out = model(ids)
    hidden = plain.model(ids)
    torch.testing.assert_close(out.logits, model.score(hidden.last_hidden_state[:, -1]))
    assert (out.aux_loss is None) == (plain(ids).aux_loss is None)


@pytest.mark.parametrize("way", ["from_pretrained", "load", "the class", "the Auto class"])
def test_it_is_saved_and_read_again(folder, tmp_path, way):
    ways = {
        "from_pretrained": from_pretrained,
        "load": lambda *args, **given: load(args[0], pretrained=True, **given),
        "the class": OmniMoeForSequenceClassification.from_pretrained,
        "the Auto class": AutoModelForSequenceClassification.from_pretrained,
    }
    model = ways[way](folder, num_labels=3)
    model.config.id2label = {0: "cat", 1: "dog", 2: "tree"}
    model.save_pretrained(tmp_path / "classifier")
    again = ways[way](tmp_path / "classifier")
    assert type(again) is OmniMoeForSequenceClassification
    assert again.config.id2label == {0: "cat", 1: "dog", 2: "tree"}
    ids = ids_like(model.config)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "classifier")(ids)[0], model.model(ids)[0])


def test_a_fresh_one_by_name():
    model = load("mot_nano", seed=0, num_layers=1, num_labels=5)
    assert type(model) is omnimoe.OmniMoeForSequenceClassification
    assert (model.config.num_labels, model.score.out_features, model.training) == (5, 5, True)
    assert load("mot_nano", device="meta", num_layers=1, num_labels=2).score.weight.device.type == "meta"
    small = load("omni_nano", pretrained=True, num_labels=2)
    assert small.config.card["license"]


@pytest.mark.hazard(9)
def test_a_head_of_another_size(folder, tmp_path):
    from_pretrained(folder, num_labels=3).save_pretrained(tmp_path / "three")
    for load_it in (from_pretrained, AutoModelForSequenceClassification.from_pretrained):
        with refused(tmp_path, "score.weight: (3, 16) in the file, (5, 16) in the model", MisfitError):
            load_it(tmp_path / "three", num_labels=5)
        assert load_it(tmp_path / "three", num_labels=5, ignore_mismatched_sizes=True).score.out_features == 5
    with refused(tmp_path, "1 missing:\n  lm_head.weight", MisfitError):
        OmniMoeForCausalLM.from_pretrained(tmp_path / "three")


@pytest.mark.hazard(8)
def test_only_the_head_may_be_fresh(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    held = load_file(path)
    held.pop("model.norm.weight")
    save_file(held | {"model.extra": torch.ones(1)}, path, metadata={"format": "pt"})
    fragment = "1 missing:\n  model.norm.weight\n1 unexpected:\n  model.extra\n"
    with refused(folder, fragment, MisfitError):
        from_pretrained(folder, num_labels=3)


def test_padding_is_not_classified(folder):
    model = from_pretrained(folder, num_labels=3)
    ids = ids_like(model.config, 1, 6) + 8 * (ids_like(model.config, 1, 6) == 0)
    wanted = model(ids).logits
    for padded in (torch.nn.functional.pad(ids, (0, 3)), torch.nn.functional.pad(ids, (3, 0))):
        mask = (padded != 0).long()
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        torch.testing.assert_close(model(padded, attention_mask=mask, position_ids=positions).logits, wanted)
    right = torch.nn.functional.pad(ids, (0, 3))
    torch.testing.assert_close(model(right).logits, wanted)  # pad_token_id says which


class TestLoss:
    @pytest.mark.parametrize(
        ("count", "labels", "function"),
        [
            (3, torch.tensor([2, 0]), torch.nn.functional.cross_entropy),
            (1, torch.tensor([0.5, -1.0]), lambda x, y: torch.nn.functional.mse_loss(x[:, 0], y)),
            (3, torch.tensor([[1.0, 0, 1], [0, 0, 1]]), torch.nn.functional.binary_cross_entropy_with_logits),
        ],
        ids=["one label", "regression", "several labels"],
    )
    def test_by_kind(self, count, labels, function, tmp_path):
        build(DECLARATIONS["moe"]).save_pretrained(tmp_path)
        model = from_pretrained(tmp_path, num_labels=count)
        out = model(ids_like(model.config), labels=labels)
        torch.testing.assert_close(out.loss, function(out.logits, labels) + out.aux_loss)
        out.loss.backward()
        assert all(weight.grad is not None for weight in model.parameters())

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.tensor([0, 3]), r"labels holds 3, outside \[0, 3\); load the model with num_labels= of more"),
            (torch.tensor([[0], [1]]), r"labels must be \(2,\) or, floating point, \(2, 3\).*got torch.int64 \(2, 1\)"),
            ([0, 1], "labels must be a tensor"),
        ],
    )
    def test_labels_that_do_not_fit(self, folder, labels, message):
        model = from_pretrained(folder, num_labels=3)
        with pytest.raises(InputError, match=message):
            model(ids_like(model.config), labels=labels)


def test_the_trainer_and_an_adapter(folder, tmp_path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    model = from_pretrained(folder, num_labels=2)
    targets = lora_targets(model, sites=["attention"])
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(**targets, r=4, task_type="SEQ_CLS", modules_to_save=["score"])
    )
    ids = ids_like(model.config, 8, 6)
    data = [{"input_ids": row, "labels": torch.tensor(number % 2)} for number, row in enumerate(ids)]
    given = {"max_steps": 30, "learning_rate": 0.05, "per_device_train_batch_size": 8, "save_strategy": "no"}
    given |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    trainer = Trainer(adapted, TrainingArguments(str(tmp_path), **given), train_dataset=data)
    trainer.train()
    found = trainer.predict(data)
    assert found.predictions.shape == (8, 2)
    assert (found.predictions.argmax(-1) == found.label_ids).mean() > 0.9
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.equal(from_pretrained(tmp_path / "adapter")(ids).logits, adapted.eval()(ids).logits)
    again = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=2)
    torch.testing.assert_close(again.eval()(ids).logits, adapted.eval()(ids).logits)


def test_an_adapter_on_one_tower_trains_the_head_along(folder):
    pytest.importorskip("peft")
    model = from_pretrained(folder, num_labels=2)
    adapted = add_lora(model, towers=["image"], r=2, task_type="SEQ_CLS", modules_to_save=["score"])
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert [name for name in trained if "lora" not in name] == ["base_model.model.score.modules_to_save.default.weight"]
    adapted(ids_like(model.config), labels=torch.tensor([0, 1])).loss.backward()
    assert all(weight.grad is not None for weight in adapted.parameters() if weight.requires_grad)


def test_tools_that_count_and_export_take_it(folder):
    model = from_pretrained(folder, num_labels=2)
    ids = ids_like(model.config)
    whole, counted = flops(from_pretrained(folder), ids), flops(model, ids)
    assert (counted.by_kind["head"], counted.by_kind["experts"]) == (0, whole.by_kind["experts"])
    program = export(model, inputs={"input_ids": ids}, dynamic=False)
    torch.testing.assert_close(program.module()(input_ids=ids)["logits"], model(ids).logits)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_labels": 0}, "num_labels must be a whole number from 1, got 0"),
        ({"num_labels": "3"}, "num_labels must be a whole number from 1, got '3'"),
        (
            {"num_labels": 3, "towers": ["text"]},
            "num_labels is for whole models of omnimoe; load this one without, save",
        ),
    ],
    ids=str,
)
def test_what_is_refused(folder, given, message):
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder, **given)
