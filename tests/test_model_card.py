"""The card that every save writes: what it says, what it takes from the config, and when it leaves a README alone."""

from __future__ import annotations

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM

from omnimoe import ConfigError, OmniMoeConfig, OmniMoeForCausalLM, active_params, flops, from_pretrained, load
from omnimoe.model_card import MARK, model_card
from tests.declarations import DECLARATIONS, MOT, build


@pytest.fixture
def model() -> OmniMoeForCausalLM:
    return build(MOT)


def test_a_config_that_knows_nothing_of_it_has_none():
    config = OmniMoeConfig()
    assert config.card is None
    assert "card" not in config.to_dict()
    config.card = {"license": "mit"}
    assert OmniMoeConfig.from_dict(config.to_dict()).card == {"license": "mit"}
    assert OmniMoeConfig().card is None


def test_it_says_what_was_saved(model, tmp_path):
    model.config.card = {"license": "apache-2.0", "datasets": ["org/data"], "data": "Ten pictures.", "language": "en"}
    model.save_pretrained(tmp_path / "tiny")
    card = ModelCard.load(tmp_path / "tiny" / "README.md")
    assert isinstance(card.data, ModelCardData)
    assert (card.data.library_name, card.data.license, card.data.datasets) == ("omnimoe", "apache-2.0", ["org/data"])
    assert card.data.pipeline_tag == "any-to-any"
    total = sum(parameter.numel() for parameter in model.parameters())
    for line in (
        "# tiny",
        f"| parameters | {total:,} |",
        f"| active a token | {active_params(MOT):,} |",
        f"| FLOPs a token | {flops(MOT).per_token:,.0f}, forward",
        "text (ids 0 to 19), image (ids 20 to 31), speech (ids 32 to 39)",
        "| dtype | float32 |",
        "| licence | apache-2.0 |",
        "| data | Ten pictures. |",
        "from omnimoe import from_pretrained",
    ):
        assert line in card.text


def test_its_three_lines_load_the_model(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "tiny")
    text = (tmp_path / "tiny" / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)  # noqa: S102 - what a reader would type
    assert names["model"].num_parameters() == model.num_parameters()


@pytest.mark.parametrize("kind", DECLARATIONS)
def test_every_kind_of_model_has_one(kind):
    card = model_card(OmniMoeForCausalLM(DECLARATIONS[kind]))
    head = yaml.safe_load(card.content.split("---")[1])
    assert head["tags"][0] == "omnimoe"
    assert ("mixture-of-transformers" in head["tags"]) == (DECLARATIONS[kind].attention.towers != "shared")
    assert "unknown" not in card.text


def test_a_model_of_text_generates_text():
    card = model_card(OmniMoeForCausalLM(OmniMoeConfig(hidden_size=16, num_layers=1)))
    assert card.data.pipeline_tag == "text-generation"
    assert "multimodal" not in card.data.tags


def test_a_part_that_does_not_say_what_it_costs(model, monkeypatch):
    monkeypatch.setattr(type(MOT.experts), "active_params", lambda self, hidden_size, modality: None)
    assert "| active a token | unknown |" in model_card(model).text


def test_facts_stay_with_the_model(model, tmp_path):
    model.config.card = {"license": "mit", "paper": "https://example.org"}
    model.save_pretrained(tmp_path / "one")
    from_pretrained(tmp_path / "one", towers=["text"]).save_pretrained(tmp_path / "two")
    AutoModelForCausalLM.from_pretrained(tmp_path / "two").save_pretrained(tmp_path / "three")
    text = (tmp_path / "three" / "README.md").read_text()
    assert "license: mit" in text
    assert "https://example.org" in text


def test_weights_of_the_zoo_bring_their_facts(tmp_path):
    model = load("omni_nano_dense", pretrained=True)
    assert model.config.card == {"license": "apache-2.0", "paper": "https://arxiv.org/abs/2405.09818"}
    assert "license: apache-2.0" in model_card(model).content


@pytest.mark.parametrize(
    ("facts", "message"),
    [("mit", "must be a mapping"), ({"licence": "mit"}, "unknown fields: licence. Fields: license")],
)
def test_wrong_facts_are_refused_before_anything_is_written(model, tmp_path, facts, message):
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.config.card = facts
    with pytest.raises(ConfigError, match=message):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("text", ["# My model\n", "", "---\nlicense: mit\n---\n", "\xff"])
def test_a_readme_of_the_user_stays(model, tmp_path, text):
    (tmp_path / "README.md").write_text(text, encoding="latin-1")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="latin-1") == text
    from_pretrained(tmp_path, verify=True)


def test_a_card_of_ours_is_renewed_until_it_is_claimed(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    ours = path.read_text()
    path.write_text(ours.replace("float32", "float99"))
    model.save_pretrained(tmp_path)
    assert path.read_text() == ours
    path.write_text(ours.replace(MARK, "Mine."))
    model.save_pretrained(tmp_path)
    assert path.read_text() == ours.replace(MARK, "Mine.")
    from_pretrained(tmp_path, verify=True)
