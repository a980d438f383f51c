"""The harness itself runs on tiny models, with local tasks; its numbers are those of the model's own forward pass."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import json
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from omnimoe import CheckpointError, load_tokenizer
from omnimoe.lm_eval import TextTokenizer, text_rows, text_tokenizer
from omnimoe.modalities import Tokens
from tests.declarations import DECLARATIONS, IMAGE, PATCHES, build

pytest.importorskip("lm_eval")
instance = importlib.import_module("lm_eval.api.instance")
evaluator = importlib.import_module("lm_eval.evaluator")
tasks = importlib.import_module("lm_eval.tasks")
adapter = importlib.import_module("omnimoe.lm_eval").OmniMoeLM

ROOT = Path(__file__).parents[2]
TEXT = Tokens.Config(name="text", vocab_size=2048)
PADDED = Tokens.Config(name="text", vocab_size=2100)
KINDS = ["mot", "moma", "expert_choice", "block_causal"]
PAIRS = [("a red", " circle"), ("a red", " square above it"), ("", "two dogs"), ("the picture shows ", "a cat")]


def declared(name, text=TEXT, **changes):
    config = DECLARATIONS[name]
    others = [held for held in config.modalities if held.name != "text"]
    return config.replace(modalities=(text, *others), max_position_embeddings=64, **changes)


def requests(kind, arguments):
    return [instance.Instance(request_type=kind, doc={}, arguments=given, idx=0) for given in arguments]


def own_log_likelihood(model, ids, scored, size=2048):
    """The last ``scored`` of ``ids``, by a plain forward pass without any batch, normalised over rows of text."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=not model.config.is_causal).logits[0, :-1]
    log_probs = logits.masked_fill(~text_rows(model.config, size), -math.inf).log_softmax(-1)
    found = log_probs.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)[-scored:]
    is_greedy = bool((log_probs.argmax(-1)[-scored:] == torch.tensor(ids[-scored:])).all())
    return found.sum().item(), is_greedy


def encoded(context, continuation, tokenizer):
    """Ids with the begin token, and how many of them the continuation is; its spaces go with it."""
    stripped = context.rstrip()
    whole = tokenizer.encode(stripped + context[len(stripped) :] + continuation).tolist()
    return [1, *whole], len(whole) - len(tokenizer.encode(stripped))


@pytest.fixture(scope="module")
def bpe():
    return load_tokenizer("text")


class TestLikelihoods:
    @pytest.mark.parametrize(("name", "batch_size"), [*itertools.product(KINDS, [1, 3]), ("moma", "auto")])
    def test_they_are_the_models_own(self, name, batch_size, bpe):
        model = build(declared(name))
        found = adapter(model, device="cpu", batch_size=batch_size, max_batch_size=4).loglikelihood(
            requests("loglikelihood", PAIRS), disable_tqdm=True
        )
        for (context, continuation), (log_likelihood, is_greedy) in zip(PAIRS, found, strict=True):
            expected = own_log_likelihood(model, *encoded(context, continuation, bpe))
            assert log_likelihood == pytest.approx(expected[0], abs=1e-3)
            assert is_greedy == expected[1]

    def test_of_whole_texts(self, bpe):
        model = build(declared("mot"))
        text = "a red circle on a white ground"
        (found,) = adapter(model, device="cpu").loglikelihood_rolling(
            requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True
        )
        ids = [1, *bpe.encode(text).tolist()]
        assert found == pytest.approx(own_log_likelihood(model, ids, len(ids) - 1)[0], abs=1e-3)

    def test_of_texts_longer_than_the_model(self, bpe):
        text = "a red circle and a blue square and " * 12
        assert len(bpe.encode(text)) > 64
        (found,) = adapter(build(declared("mot")), device="cpu").loglikelihood_rolling(
            requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True
        )
        assert -math.inf < found < 0

    def test_rows_past_the_tokenizer_and_of_other_modalities_have_none(self, bpe):
        config = declared("mot", PADDED)
        model = build(config)
        harness = adapter(model, tokenizer=bpe, device="cpu")
        scores = harness._model_call(torch.tensor([[1, 100, 200]]))
        image = config.token_ranges["image"]
        assert scores[..., 2048:2100].eq(-math.inf).all()
        assert scores[..., image.start : image.stop].eq(-math.inf).all()
        assert scores[..., [3, 4, 5, 6]].eq(-math.inf).all()  # boundaries of pictures and speech
        assert scores[..., [0, 1, 2, *range(7, 2048)]].isfinite().all()
        found = harness.loglikelihood(requests("loglikelihood", PAIRS[:1]), disable_tqdm=True)
        expected = own_log_likelihood(model, *encoded(*PAIRS[0], bpe))
        assert found[0][0] == pytest.approx(expected[0], abs=1e-3)
        every = adapter(model, tokenizer=bpe, device="cpu", all_rows=True)._model_call(torch.tensor([[1, 100, 200]]))
        torch.testing.assert_close(every, model(torch.tensor([[1, 100, 200]])).logits)

    def test_copies_picked_by_another_key(self, bpe):
        config = declared("mot", keys=("look", "draw", "speak"))
        model = build(config)
        one, other = (
            adapter(model, device="cpu", key=key).loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
            for key in ("look", "draw")
        )
        assert one != other
        ids, scored = encoded(*PAIRS[0], bpe)
        with torch.no_grad():
            logits = model(torch.tensor([ids]), key_ids=torch.ones(1, len(ids), dtype=torch.int64)).logits[0, :-1]
        log_probs = logits.masked_fill(~text_rows(config, 2048), -math.inf).log_softmax(-1)
        expected = log_probs.gather(1, torch.tensor(ids[1:]).unsqueeze(1))[-scored:].sum().item()
        assert other[0][0] == pytest.approx(expected, abs=1e-3)

    def test_an_adapter(self, tmp_path):
        peft = pytest.importorskip("peft")
        from omnimoe import lora_targets

        model = build(declared("mot"))
        config = peft.LoraConfig(**lora_targets(model), r=2, init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        adapted.save_pretrained(tmp_path)
        found = adapter(build(declared("mot")), device="cpu", peft=str(tmp_path)).loglikelihood(
            requests("loglikelihood", PAIRS), disable_tqdm=True
        )
        merged = adapter(adapted.merge_and_unload(), device="cpu").loglikelihood(
            requests("loglikelihood", PAIRS), disable_tqdm=True
        )
        assert [one[0] for one in found] == pytest.approx([one[0] for one in merged], abs=1e-3)
        (tmp_path / "adapter_model.safetensors").write_bytes(b"{}")
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
            adapter(build(declared("mot")), device="cpu", peft=str(tmp_path))


class TestGeneration:
    @pytest.mark.parametrize("name", ["mot", "moma", "block_causal"])
    def test_texts_alone_come(self, name):
        model = build(declared(name, PADDED))
        harness = adapter(model, tokenizer=load_tokenizer("text"), device="cpu", batch_size=2)
        asked = [("a red", {"until": ["\n"], "max_gen_toks": 8}), ("the", {"until": ["\n"], "max_gen_toks": 8})]
        seen = []
        generate = model.generate
        model.generate = lambda **given: seen.append(generate(**given)) or seen[-1]
        found = harness.generate_until(requests("generate_until", asked), disable_tqdm=True)
        assert len(found) == 2
        assert all(isinstance(text, str) for text in found)
        assert text_rows(model.config, 2048)[seen[0]].logical_or(seen[0] == 0).all()


class TestTokenizers:
    @pytest.mark.parametrize("text", ["a cat", "<bos>", "a <image> b", "Grüße, 東京 🙂", " two  spaces ", "\n"])
    def test_texts_come_back_and_markers_are_text(self, bpe, text):
        tokens = TextTokenizer(bpe)
        assert tokens.encode(text, add_special_tokens=False) == bpe.encode(text).tolist()
        assert tokens.encode(text) == [1, *bpe.encode(text).tolist()]
        assert tokens.decode(tokens.encode(text), skip_special_tokens=True) == text
        assert tokens.decode(1) == "<bos>"
        assert (len(tokens), tokens.pad_token_id, tokens.bos_token_id, tokens.eos_token_id) == (2048, 0, 1, 2)

    def test_a_batch_is_padded(self, bpe):
        found = TextTokenizer(bpe)(["a", "a red circle"], padding="longest", return_tensors="pt")
        assert found["input_ids"].shape == found["attention_mask"].shape
        assert found["attention_mask"].sum(1).tolist() == [2, 1 + len(bpe.encode("a red circle"))]

    def test_the_folder_holds_one_of_ours(self, tmp_path, bpe):
        model = build(declared("mot"))
        model.save_pretrained(tmp_path)
        bpe.save_pretrained(tmp_path)
        harness = adapter(str(tmp_path), device="cpu")
        assert isinstance(harness.tokenizer, TextTokenizer)
        found = harness.loglikelihood(requests("loglikelihood", PAIRS[:1]), disable_tqdm=True)
        assert found[0][0] == pytest.approx(own_log_likelihood(model, *encoded(*PAIRS[0], bpe))[0], abs=1e-3)

    def test_the_folder_holds_one_of_transformers(self, tmp_path):
        import tokenizers
        from transformers import PreTrainedTokenizerFast

        words = {"<unk>": 0, "<s>": 1, "a": 2, "red": 3, "circle": 4}
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
        model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<s>").save_pretrained(tmp_path)
        plain = build(DECLARATIONS["mot"])
        plain.save_pretrained(tmp_path)
        harness = adapter(str(tmp_path), device="cpu", add_bos_token=False)
        found = harness.loglikelihood(requests("loglikelihood", [("a", " red circle")]), disable_tqdm=True)
        assert found[0][0] == pytest.approx(own_log_likelihood(plain, [2, 3, 4], 2, size=5)[0], abs=1e-3)

    def test_what_does_not_fit(self, tmp_path, bpe):
        with pytest.raises(ValueError, match="the tokenizer has 2048 ids from 0, the model's rows 0 to 20 are text"):
            text_tokenizer(DECLARATIONS["mot"], bpe)
        with pytest.raises(ValueError, match=r"holds no tokenizer: none of text_tokenizer.json"):
            text_tokenizer(DECLARATIONS["mot"], tmp_path)
        with pytest.raises(ValueError, match="tokenizer"):
            text_tokenizer(DECLARATIONS["mot"])


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("encoder", {}, "the mask rule 'bidirectional' lets tokens see later ones"),
        ("mot", {"key": "look"}, "key='look' for a model without keys; leave it out"),
    ],
)
def test_refusals(name, given, message):
    with pytest.raises(ValueError, match=message):
        adapter(build(declared(name)), device="cpu", **given)


def test_a_model_with_keys_must_be_told_which(bpe):
    config = declared("mot", keys=("look", "draw", "speak"))
    with pytest.raises(ValueError, match="are picked by look, draw, speak; pass key= one of them"):
        adapter(build(config), device="cpu")


def test_blocks_of_latents_do_not_stand_in_the_way():
    config = DECLARATIONS["transfusion"].replace(modalities=(TEXT, PATCHES), max_position_embeddings=64)
    found = adapter(build(config), device="cpu").loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert all(math.isfinite(log_likelihood) for log_likelihood, _ in found)


def test_pictures_seen_whole_do_not_stand_in_the_way():
    config = DECLARATIONS["block_causal"].replace(modalities=(TEXT, IMAGE), max_position_embeddings=64)
    assert adapter(build(config), device="cpu").model is not None


@pytest.fixture
def local_tasks(tmp_path, monkeypatch):
    """Two tasks in a folder, whose data lies beside them, and a cache of their own."""
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    datasets = importlib.import_module("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"question": "a red", "choices": [" circle", " dog", " house"], "answer": 0},
        {"question": "two black", "choices": [" cats", " square above it"], "answer": 1},
        {"question": "under the", "choices": [" sea", " tree", " moon", " bed"], "answer": 3},
    ]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["a red circle on white", "a dog runs", "the moon over the sea"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    folder = tmp_path / "tasks"
    folder.mkdir()
    common = "dataset_path: json\ntest_split: test\n"
    (folder / "own_choices.yaml").write_text(
        f"task: own_choices\n{common}dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'choices.jsonl'}\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    (folder / "own_texts.yaml").write_text(
        f"task: own_texts\n{common}dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'texts.jsonl'}\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    )
    return folder, rows, texts


def test_tasks_of_a_folder(local_tasks, bpe):
    folder, rows, texts = local_tasks
    model = build(declared("moma"))
    found = evaluator.simple_evaluate(
        model=adapter(model, device="cpu", batch_size=4),
        tasks=["own_choices", "own_texts"],
        task_manager=tasks.TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    right = 0
    for row, sample in zip(rows, found["samples"]["own_choices"], strict=True):
        own = [own_log_likelihood(model, *encoded(row["question"], choice, bpe))[0] for choice in row["choices"]]
        told = [float(answer[0][0]) for answer in sample["resps"]]
        assert told == pytest.approx(own, abs=1e-3)
        right += max(range(len(own)), key=own.__getitem__) == row["answer"]
    assert found["results"]["own_choices"]["acc,none"] == pytest.approx(right / len(rows))
    total = sum(own_log_likelihood(model, [1, *(ids := bpe.encode(text).tolist())], len(ids))[0] for text in texts)
    words, letters = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    results = found["results"]["own_texts"]
    assert results["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-3)
    assert results["bits_per_byte,none"] == pytest.approx(-total / letters / math.log(2), rel=1e-3)


def test_the_harness_knows_the_adapter_by_name_once_it_is_imported():
    assert importlib.import_module("lm_eval.api.registry").get_model("omnimoe") is adapter


def test_the_entry_point_is_the_adapter():
    declared_points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    value = declared_points["lm_eval.models"]["omnimoe"]
    found = importlib.metadata.EntryPoint(name="omnimoe", value=value, group="lm_eval.models")
    assert found.load() is adapter
    registry = importlib.import_module("lm_eval.api.registry").Registry("models_of_a_test")
    registry.register("omnimoe", target=found)
    assert registry.get("omnimoe") is adapter


@pytest.mark.slow
def test_the_command_line(local_tasks, tmp_path):
    folder, _, _ = local_tasks
    build(declared("mot")).save_pretrained(tmp_path / "model")
    command = [
        *(sys.executable, "-m", "omnimoe.lm_eval", "--model", "omnimoe"),
        *("--model_args", f"pretrained={tmp_path / 'model'}", "--tasks", "own_choices", "--device", "cpu"),
        *("--include_path", str(folder), "--output_path", str(tmp_path / "out")),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "own_choices" in done.stdout
    (result,) = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(result.read_text())["results"]["own_choices"]["acc,none"] <= 1


def test_without_the_harness(monkeypatch):
    module = importlib.import_module("omnimoe.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    monkeypatch.setattr(module, "_adapter", module._adapter.__wrapped__)
    with pytest.raises(ImportError, match=r"pip install 'omnimoe\[lm-eval\]'"):
        _ = module.OmniMoeLM
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = module.Nothing
