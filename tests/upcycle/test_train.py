"""Training from a seed: the command, the data's place, what stays frozen, and resuming."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from omnimoe import from_pretrained, upcycle
from omnimoe.cli import main
from omnimoe.data import Corpus, CorpusError, retokenize_corpus
from omnimoe.data.documents import SequenceError
from omnimoe.data.tokenize import ragged
from omnimoe.routers import ByModalityRouter
from omnimoe.tokenizers import load_tokenizer
from omnimoe.tokenizers.bytes import ByteTokenizer
from omnimoe.train import ResumeError, Training, TrainSettings
from omnimoe.train.checkpoint import load_state
from tests.train.runs import build, settings, tiny

QUICK = ["--batch-size", "2", "--sequence-length", "128", "--warmup", "1", "--evaluate-batches", "1"]
QUICK += ["--precision", "fp32"]


@pytest.fixture(scope="module")
def corpus():
    return Corpus.load("p")


@pytest.fixture(scope="module")
def seed_run(tmp_path_factory, corpus):
    """A run of two steps of a dense model."""
    folder = tmp_path_factory.mktemp("seed")
    Training(build(tiny()), settings(steps=2), corpus=corpus, out=folder, show_progress=False).run()
    return folder


def log_of(folder, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_data_go_on_and_the_rest_starts_anew(seed_run, corpus, tmp_path, capsys):
    run = tmp_path / "run"
    called = ["train", "--from", str(seed_run), "--experts", "text=2,image=2,speech=1", "--towers", "modality"]
    assert main([*called, "--out", str(run), "--steps", "3", "--freeze", "text", *QUICK]) == 0
    told = capsys.readouterr().out
    assert "exact: model.backbone.layers.*.mlp" in told
    assert "optimizer and schedule start anew" in told
    (line,) = log_of(run, "follows")
    assert (line["step"], line["tokens"]) == (2, 512)
    first = load_state(seed_run / "checkpoint")
    after = load_state(run / "checkpoint")
    assert line["epoch"] > 0
    assert after["data"]["cursor"]["tokens"] > first["data"]["cursor"]["tokens"]
    assert (after["step"], after["history"]["steps"]) == (3, [0, 2, 3])
    assert {float(held["step"]) for held in after["optimizer"]["state"].values()} == {3.0}
    # the batches are those that the seed's run would have seen next
    unbroken = Training(build(tiny()), settings(steps=5), corpus=corpus, show_progress=False)
    for _ in range(5):
        next(unbroken.batches)
    assert unbroken.batches.state_dict() == after["data"]
    model, seed = from_pretrained(run / "checkpoint"), from_pretrained(seed_run / "checkpoint")
    assert isinstance(model.config.experts.router, ByModalityRouter.Config)
    ids = torch.randint(16, 2048, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., 16:2048], seed(ids).logits[..., 16:2048], atol=1e-2, rtol=0)
    copy = model.model.backbone.layers[0].self_attn.q_proj.weight
    assert torch.equal(copy[0], seed.model.backbone.layers[0].self_attn.q_proj.weight[0])
    assert not torch.equal(copy[1], copy[0])


def test_a_frozen_run_resumes_bitwise(seed_run, corpus, tmp_path):
    def run(folder, until=None):
        model = upcycle(
            from_pretrained(seed_run / "checkpoint"), towers="modality", experts={"text": 2, "image": 2, "speech": 2}
        )
        return Training(model, settings(steps=4, freeze="text"), corpus=corpus, out=folder, show_progress=False)

    whole = run(tmp_path / "whole")
    whole.follow(seed_run / "checkpoint")
    whole.run()
    broken = run(tmp_path / "broken")
    broken.follow(seed_run / "checkpoint")
    broken.run(until=2)
    again = run(tmp_path / "broken")
    again.resume()
    again.run()
    state = again.model.state_dict()
    assert all(torch.equal(held, state[name]) for name, held in whole.model.state_dict().items())
    assert len(log_of(tmp_path / "broken", "follows")) == 1
    other = run(tmp_path / "broken")
    other.settings = other.settings.replace(freeze="")
    with pytest.raises(ResumeError, match="freeze was 'text' and is ''"):
        other.resume()


def test_the_command_resumes_an_upcycled_run(seed_run, tmp_path):
    called = ["train", "--from", str(seed_run), "--towers", "modality", "--out", str(tmp_path / "run"), *QUICK]
    assert main([*called, "--steps", "2"]) == 0
    assert main([*called, "--steps", "2"]) == 2
    assert main([*called, "--steps", "2", "--resume"]) == 0
    assert len(log_of(tmp_path / "run", "follows")) == 1


def test_as_it_was_and_from_the_start_of_the_data(seed_run, tmp_path, capsys):
    called = ["train", "--from", str(seed_run / "checkpoint"), "--fresh-data", "--steps", "1", *QUICK]
    assert main([*called, "--out", str(tmp_path / "run")]) == 0
    assert "as it was" in (told := capsys.readouterr().out)
    assert "start at the front" in told
    assert log_of(tmp_path / "run", "follows") == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--out", "x"], "name a model to train, or a seed"),
        (["dense_nano", "--from", "x", "--out", "x"], "not both"),
        (["dense_nano", "--experts", "4", "--out", "x"], "--experts changes a seed"),
        (["--from", "SEED", "--experts", "many", "--out", "x"], "--experts takes a number"),
        (["--from", "SEED", "--towers", "a,b", "--out", "x"], "--towers takes modality"),
        (["--from", "SEED", "--add", "video", "--out", "x"], "corpus 'p' holds text, image, speech"),
        (["--from", "SEED", "--experts", "4", "--router", "{1", "--out", "x"], "--router takes a name or JSON"),
        (["--from", "SEED", "--experts", "4", "--router", "top", "--out", "x"], "top"),
    ],
)
def test_wrong_calls(seed_run, options, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *(str(seed_run) if part == "SEED" else part for part in options)]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "x" / "checkpoint").exists()


def test_other_data_are_not_followed(seed_run, corpus):
    run = Training(build(tiny()), settings(seed=1), corpus=corpus, show_progress=False)
    with pytest.raises(SequenceError, match="seed was 0 and is 1"):
        run.follow(seed_run / "checkpoint")
    with pytest.raises(ResumeError, match="no training_state"):
        run.follow(seed_run)


def test_settings_from_before_there_was_freezing():
    plain = TrainSettings().to_dict()
    del plain["freeze"]
    assert TrainSettings.from_dict(plain).frozen == ()
    assert TrainSettings(freeze="text, image").frozen == ("text", "image")


def test_a_corpus_in_other_ids(tmp_path, corpus):
    small = tmp_path / "small"
    tokenizer = ByteTokenizer.from_pretrained()
    assert retokenize_corpus("p", small, tokenizer) == small
    held = Corpus.load(small)
    assert held.vocab_sizes == {**corpus.vocab_sizes, "text": tokenizer.vocab_size}
    was = load_tokenizer("text")
    for index in (0, 100, len(corpus) - 1):
        assert tokenizer.decode(held[index].text) == was.decode(corpus[index].text)
        assert held[index].split == corpus[index].split
    assert held.meta["rows_sha256"] != corpus.meta["rows_sha256"]
    assert (small / "ATTRIBUTION").is_file()
    with pytest.raises(CorpusError, match="above 65535"):
        ragged("text", [np.array([3, 70_000])])
