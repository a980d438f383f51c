"""transformers' Trainer, accelerate and TensorBoard at work on tiny models; their numbers against a plain loop's."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from omnimoe import from_pretrained
from tests.declarations import DECLARATIONS, build, ids_like

accelerate = pytest.importorskip("accelerate")
EXAMPLES = Path(__file__).parents[2] / "examples"
KINDS = ["mot_post", "moe_sigmoid", "moma_top_k"]


def rows(config, count=8):
    """Sequences with labels, some of which are ignored, so that batches weigh differently."""
    ids = ids_like(config, count, 12)
    labels = ids.clone()
    for row in range(count):
        labels[row, : row % 4] = -100
    return [{"input_ids": one, "labels": other} for one, other in zip(ids, labels, strict=True)]


def arguments(folder, **changes):
    given = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(str(folder), **{**given, **changes})


class InOrder(Trainer):
    """Takes the rows as they come, so that a plain loop can take the same."""

    def _get_train_sampler(self, *args, **kwargs):
        return None


def scalars(folder):
    """Every series in the event files of a folder, by tag."""
    found = {}
    for path in sorted({file.parent for file in Path(folder).rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(path))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


@pytest.fixture
def trainer_of_the_example():
    return runpy.run_path(str(EXAMPLES / "hf_trainer.py"))["OmniTrainer"]


class TestTrainer:
    @pytest.mark.parametrize("name", KINDS)
    def test_it_steps_as_a_plain_loop(self, name, tmp_path):
        config = DECLARATIONS[name]
        data = rows(config)
        model, own = build(config), build(config).train()
        InOrder(model, arguments(tmp_path), train_dataset=data).train()
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        for start in (0, 4):
            batch = {key: torch.stack([row[key] for row in data[start : start + 4]]) for key in data[0]}
            own(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for (place, value), other in zip(model.named_parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-4, msg=place)

    @pytest.mark.parametrize("by_example", [False, True])
    def test_accumulated_gradients_are_those_of_one_batch(self, by_example, tmp_path, trainer_of_the_example):
        config = DECLARATIONS["mot_post"]
        data, found = rows(config), []
        kind = trainer_of_the_example if by_example else Trainer
        kind = type("Ordered", (kind,), {"_get_train_sampler": InOrder._get_train_sampler})
        for size, accumulated in ((8, 1), (2, 4)):
            model = build(config)
            given = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 1}
            kind(model, arguments(tmp_path, **given), train_dataset=data).train()
            found.append(dict(model.named_parameters()))
        for place, value in found[0].items():
            torch.testing.assert_close(value, found[1][place], atol=1e-5, rtol=1e-4, msg=place)

    def test_a_checkpoint_is_resumed_and_is_a_model(self, tmp_path):
        config = DECLARATIONS["moma_top_k"]
        data = rows(config)
        given = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "per_device_train_batch_size": 2}
        whole = build(config)
        Trainer(whole, arguments(tmp_path / "whole", **given), train_dataset=data).train()
        again = build(config, seed=1)
        trainer = Trainer(again, arguments(tmp_path / "again", **given), train_dataset=data)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
        for (place, value), other in zip(whole.named_parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(value, other, msg=place)
        ids = ids_like(config)
        saved = from_pretrained(tmp_path / "whole" / "checkpoint-3")
        torch.testing.assert_close(saved(ids).logits, whole.eval()(ids).logits)

    def test_it_evaluates_and_predicts(self, tmp_path):
        config = DECLARATIONS["mot"]
        data, model = rows(config), build(config)
        trainer = Trainer(model, arguments(tmp_path, prediction_loss_only=True), eval_dataset=data)
        batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
        assert trainer.evaluate()["eval_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-4)

    @pytest.mark.parametrize("name", ["dense", "moe", "moma_top_k", "mot_hybrid"])
    def test_predictions_are_the_logits(self, name, tmp_path):
        """Routings, layouts and losses by modality, which no batch can be joined with another by, are not gathered."""
        config = DECLARATIONS[name]
        data, model = rows(config), build(config)
        given = arguments(tmp_path, per_device_eval_batch_size=3)

        def accuracy(told):
            wanted = told.label_ids[:, 1:]
            right = (told.predictions[:, :-1].argmax(-1) == wanted)[wanted != -100]
            return {"accuracy": float(right.mean())}

        trainer = Trainer(model, given, eval_dataset=data, compute_metrics=accuracy)
        found = trainer.predict(data)
        batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
        logits = model(**batch).logits
        if config.is_causal:  # routers of moma_top_k balance over the batch, and choose row by row
            torch.testing.assert_close(torch.from_numpy(found.predictions), logits, atol=1e-5, rtol=1e-4)
        chosen = batch["labels"][:, 1:] != -100
        right = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:])[chosen].float().mean()
        assert trainer.evaluate()["eval_accuracy"] == pytest.approx(right.item())
        assert found.predictions.shape == tuple(logits.shape)

    def test_tensorboard_has_the_losses_by_modality(self, tmp_path, trainer_of_the_example, monkeypatch):
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
        config = DECLARATIONS["mot"]
        given = arguments(tmp_path, report_to="tensorboard", max_steps=3)
        trainer = trainer_of_the_example(build(config), given, train_dataset=rows(config))
        trainer.train()
        found = scalars(tmp_path / "logs")
        told = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(told) == 3
        for tag in ("loss", "loss_text", "loss_image", "loss_speech", "learning_rate"):
            series = [(entry["step"], pytest.approx(entry[tag], rel=1e-5)) for entry in told]
            assert found[f"train/{tag}"] == series

    def test_an_adapter(self, tmp_path):
        pytest.importorskip("peft")
        from omnimoe import add_lora

        config = DECLARATIONS["mot_post"]
        model = add_lora(build(config), towers=["image"], r=2, task_type="CAUSAL_LM")
        before = {place: value.detach().clone() for place, value in model.named_parameters()}
        given = {"save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1, "optim": "adamw_torch"}
        Trainer(model, arguments(tmp_path, **given), train_dataset=rows(config)).train()
        moved = {place for place, value in model.named_parameters() if not torch.equal(value, before[place])}
        assert moved
        assert all("lora_" in place for place in moved)
        assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()


class TestAccelerate:
    @pytest.mark.parametrize("name", KINDS)
    def test_accumulated_gradients_are_the_mean_of_the_batches(self, name):
        config = DECLARATIONS[name]
        data = rows(config)
        model, own = build(config).train(), build(config).train()
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
        loader = DataLoader(data, batch_size=4)
        model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
        steps = 0
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            steps += accelerator.sync_gradients
        assert steps == 1
        (sum(own(**batch).loss for batch in DataLoader(data, batch_size=4)) / 2).backward()
        torch.optim.SGD(own.parameters(), lr=0.1).step()
        for (place, value), other in zip(
            accelerator.unwrap_model(model).named_parameters(), own.parameters(), strict=True
        ):
            torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-4, msg=place)

    def test_its_state_is_saved_and_read_again(self, tmp_path):
        config = DECLARATIONS["moma_top_k"]
        data = DataLoader(rows(config), batch_size=4)
        found = []
        for resumed in (False, True):
            accelerator = accelerate.Accelerator(cpu=True)
            model = build(config, seed=int(resumed)).train()
            model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
            for index, batch in enumerate(data):
                if resumed and index == 0:
                    accelerator.load_state(str(tmp_path / "state"))
                    continue
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
                if not resumed and index == 0:
                    accelerator.save_state(str(tmp_path / "state"))
            found.append(accelerator.unwrap_model(model).state_dict())
        for place, value in found[0].items():
            torch.testing.assert_close(value, found[1][place], msg=place)

    def test_its_tracker_writes_what_the_loop_prints(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["accelerate_loop", "--steps", "2", "--logs", str(tmp_path)])
        runpy.run_path(str(EXAMPLES / "accelerate_loop.py"), run_name="__main__")
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
        found = scalars(tmp_path)
        assert {"loss", "text", "image", "speech"} >= set(found) >= {"loss", "text", "image"}
        for tag, series in found.items():
            assert [step for step, _ in series] == [1, 2]
            assert all(f"{tag} {value:.3f}" in line for line, (_, value) in zip(lines, series, strict=True))
