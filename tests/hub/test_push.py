"""Models to the Hub: what a commit holds, what stays, and what is refused with nothing changed."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

from omnimoe import CheckpointError, from_pretrained, load, lora_targets
from omnimoe.model_card import MARK
from tests.declarations import MOT, build, ids_like
from tests.hub.conftest import same
from tests.hub.server import Fault
from tests.refusals import refused

NAME = "org/tiny"


@pytest.fixture
def writer(hub, monkeypatch):
    """A Hub on which we may write."""
    hub.tokens["writer"] = {"write"}
    monkeypatch.setenv("HF_TOKEN", "writer")
    return hub


def weights_in(files) -> list[str]:
    return sorted(name for name in files if name.endswith((".safetensors", ".safetensors.index.json")))


def test_push_and_load(writer, model):
    commit = model.push_to_hub(NAME, commit_message="First", commit_description="All of it", tags=["tiny", "moe"])
    repository = writer.repositories[NAME]
    assert commit == commit.commit_url == f"{writer.endpoint}/{NAME}/commit/{repository.branches['main']}"
    assert repository.messages[-1] == ("First", "All of it")
    assert not repository.is_private
    assert same(from_pretrained(NAME, verify=True), model)
    card = ModelCard(repository.files()["README.md"].decode())
    assert card.data.library_name == "omnimoe"
    assert {"tiny", "moe", "mixture-of-transformers", "text"} <= set(card.data.tags)
    assert f'from_pretrained("{NAME}")' in card.text


def test_a_name_without_an_owner_is_ones_own(writer, model):
    model.push_to_hub("tiny", private=True)
    assert writer.repositories["me/tiny"].is_private
    assert same(from_pretrained("me/tiny"), model)


def test_weights_of_an_earlier_push_go(writer, model):
    """One file and shards side by side would be read differently by different tools."""
    model.push_to_hub(NAME, max_shard_size="6KB")
    repository = writer.repositories[NAME]
    assert len(weights_in(repository.files())) > 4
    repository.commit(repository.files() | {"tokenizer.json": b"{}", "steps/1/model.safetensors": b"other"})
    model.push_to_hub(NAME)
    assert weights_in(repository.files()) == ["model.safetensors", "steps/1/model.safetensors"]
    assert "tokenizer.json" in repository.files()
    assert same(from_pretrained(NAME, verify=True), model)


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_card_that_somebody_wrote_stays(writer, model, is_ours):
    model.push_to_hub(NAME)
    repository = writer.repositories[NAME]
    ours = repository.files()["README.md"].decode()
    there = ours.replace("Made with", "MADE WITH") if is_ours else ours.replace(MARK, "My own words.")
    repository.commit(repository.files() | {"README.md": there.encode()})
    model.push_to_hub(NAME)
    assert repository.files()["README.md"].decode() == (ours if is_ours else there)
    from_pretrained(NAME, verify=True)


def test_a_branch(writer, model):
    model.push_to_hub(NAME)
    repository = writer.repositories[NAME]
    first = repository.branches["main"]
    for seed in (1, 2):
        other = build(MOT, seed=seed)
        other.push_to_hub(NAME, revision="next")
        assert same(from_pretrained(NAME, revision="next"), other)
    assert repository.branches["main"] == first


def test_a_pull_request(writer, model):
    model.push_to_hub(NAME)
    repository, first = writer.repositories[NAME], writer.repositories[NAME].branches["main"]
    other = build(MOT, seed=1)
    commit = other.push_to_hub(NAME, create_pr=True)
    assert commit.pr_url == f"{writer.endpoint}/{NAME}/discussions/1"
    assert repository.branches == {"main": first}
    assert same(from_pretrained(NAME, revision="refs/pr/1"), other)


def test_what_has_not_changed_is_not_sent_again(writer, model):
    model.push_to_hub(NAME)
    writer.requests.clear()
    model.push_to_hub(NAME)
    assert not [line for line in writer.requests if line.startswith("PUT")]


def test_saving_may_push(writer, model, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "secret.txt").write_text("stays here")
    model.save_pretrained(tmp_path / "run", push_to_hub=True, repo_id=NAME, max_shard_size="6KB", private=True)
    files = writer.repositories[NAME].files()
    assert writer.repositories[NAME].is_private
    assert "secret.txt" not in files
    assert len(weights_in(files)) > 4
    assert same(from_pretrained(tmp_path / "run", verify=True), model)


@pytest.mark.parametrize(
    ("token", "pattern", "status", "fragment"),
    [
        ("reader", "", 0, "the token may not do this with 'org/tiny': .*need write access"),
        ("expired", "", 0, "the token was refused"),
        (False, "", 0, "with a token alone, and there is none; log in with `hf auth login` or pass token="),
        ("writer", "POST .*/commit/", 503, "answered 503 for 'org/tiny'"),
        ("writer", "PUT /large", 500, "answered 500 for 'org/tiny'"),
        ("writer", "POST .*/commit/", 412, "refused 'org/tiny' with 412"),
    ],
)
def test_what_is_refused_changes_nothing(writer, model, token, pattern, status, fragment):
    model.push_to_hub(NAME)
    repository = writer.repositories[NAME]
    before = (dict(repository.branches), len(repository.commits))
    writer.tokens["reader"] = set()
    if pattern:
        writer.faults.append(Fault(pattern, status=status))
    with pytest.raises(CheckpointError, match=fragment):
        build(MOT, seed=1).push_to_hub(NAME, token=token)
    assert (dict(repository.branches), len(repository.commits)) == before


@pytest.mark.hazard(31)
@pytest.mark.parametrize(
    ("name", "given", "fragment"),
    [
        ("", {}, "'' names no repository of the Hub; write 'org/name'"),
        (None, {}, "None names no repository of the Hub"),
        ("./runs/tiny/", {}, "'./runs/tiny/' is no id of the Hub"),
        (NAME, {"revision": ""}, "revision must be a branch, a tag or a commit, got ''"),
        (NAME, {"token": ""}, "token must be a token of the Hub, and is empty"),
    ],
)
def test_what_names_nothing_is_refused_before_anything_is_made(writer, model, tmp_path, name, given, fragment):
    held = (model, tmp_path, lambda: sorted(writer.repositories))
    with refused(held, fragment):
        model.push_to_hub(name, **given)
    if name != "":
        with refused(held, fragment):
            model.save_pretrained(tmp_path / "run", push_to_hub=True, repo_id=name, **given)
    assert writer.repositories == {}


def test_without_a_token(hub, model):
    with pytest.raises(CheckpointError, match="with a token alone, and there is none; log in with `hf auth login`"):
        model.push_to_hub(NAME)
    assert hub.repositories == {}


def test_a_tag_may_be_a_string(writer, model):
    model.push_to_hub(NAME, tags="tiny")
    card = ModelCard(writer.repositories[NAME].files()["README.md"].decode())
    assert "tiny" in card.data.tags
    assert "t" not in card.data.tags


def test_a_save_of_weights_without_numbers(tmp_path):
    hollow = load("mot_nano", device="meta")
    with pytest.raises(ValueError, match=r"52 weights of this OmniMoe.* are on the meta device.*no numbers to save"):
        hollow.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("folder", ["", None])
def test_a_save_into_no_folder(model, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="save_directory must be a folder, got .*; '.' is the current one"):
        model.save_pretrained(folder)
    assert list(tmp_path.iterdir()) == []


def test_the_trainer_pushes_what_it_saves(writer, tmp_path):
    """Its card takes the place of ours; what the manifest lists is there."""
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in ids_like(MOT, 4, 6)]
    given = {"max_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path / "run"), push_to_hub=True, hub_model_id=NAME, **given)
    trainer = Trainer(build(MOT), arguments, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    assert same(from_pretrained(NAME, verify=True), trainer.model)
    assert b"generated_from_trainer" in writer.repositories[NAME].files()["README.md"]


def test_adapters_by_their_id(writer, model, tmp_path):
    """A repository of adapters brings the base model that it names."""
    peft = pytest.importorskip("peft")
    model.push_to_hub(NAME)
    base = from_pretrained(NAME)
    assert base.name_or_path == NAME
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_parameters=lora_targets(base)["target_parameters"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(tmp_path / "lora")
    writer.add("org/lora", tmp_path / "lora")
    writer.requests.clear()
    found = from_pretrained("org/lora")
    assert "adapter_model.safetensors" in writer.fetched()
    ids = torch.tensor([[1, 9, 12, 8]])
    torch.testing.assert_close(found(ids).logits, adapted.eval()(ids).logits)
    assert not torch.equal(found(ids).logits, model(ids).logits)
