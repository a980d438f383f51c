"""Adapters in place of the tokenizers that ship: a folder to tokens, tokens to batches, a step, and generation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omnimoe.data.corpus import Corpus
from omnimoe.data.documents import default_ranges
from omnimoe.data.sequences import PackedSequences
from omnimoe.data.tokenize import tokenize_corpus
from omnimoe.generate import generate
from omnimoe.modalities import Tokens
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.tokenizers import load_tokenizer
from tests.narrow import CONFIG
from tests.tokenizers.adapted import PICTURES, read_clip, tiny_vq

pytest.importorskip("pycodec2", reason="needs pycodec2, the extra 'codec2'")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    path = tmp_path_factory.mktemp("janus")
    tiny_vq("janus_vq", num_patches=4).save_pretrained(path)
    return {
        "text": load_tokenizer("bytes"),
        "image": load_tokenizer("janus_vq", path),
        "speech": load_tokenizer("codec2"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Drawings and a spoken label of the fixtures, in the layout of a built corpus."""
    path = tmp_path_factory.mktemp("corpus")
    names = [picture.stem.replace("_", " ") for picture in PICTURES]
    shared = {"source": "emoji", "lang": "en", "style": "noto", "license": "Apache-2.0"}
    rows = [
        {**shared, "text": name, "key": name, "group": name, "image": i, "audio": i, "split": "train"}
        for i, name in enumerate(names)
    ]
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = {"source": "fixtures", "key": "readme", "text": "Drawings", "lang": "en", "split": "train", "license": "x"}
    (path / "text.jsonl").write_text(json.dumps(text))
    pictures = [np.asarray(Image.open(picture).convert("RGB")) for picture in PICTURES]
    np.save(path / "images.npy", np.stack(pictures))
    clip = read_clip()[:8000]
    np.save(path / "audio.npy", np.concatenate([np.roll(clip, 500 * i) for i in range(len(names))]))
    np.save(path / "audio_offsets.npy", np.arange(len(names) + 1) * len(clip))
    return path


@pytest.fixture(scope="module")
def corpus(folder, tokenizers, tmp_path_factory) -> Corpus:
    return Corpus.load(tokenize_corpus(folder, tmp_path_factory.mktemp("tokens"), tokenizers=tokenizers, name="own"))


@pytest.fixture(scope="module")
def model(corpus) -> OmniMoeForCausalLM:
    held = default_ranges(corpus)
    modalities = tuple(
        Tokens.Config(
            name=name,
            vocab_size=r.size,
            begin_id=r.begin_id,
            end_id=r.end_id,
            num_tokens=r.num_tokens,
            frame_size=r.frame_size,
        )
        for name, r in held.items()
    )
    torch.manual_seed(0)
    return OmniMoeForCausalLM(CONFIG.replace(modalities=modalities)).eval()


def test_a_corpus_holds_their_ids(corpus, tokenizers):
    assert corpus.vocab_sizes == {"text": 272, "image": 64, "speech": 1104}
    assert corpus.meta["num_tokens"] == {"text": None, "image": 16, "speech": None}
    assert corpus.meta["units_per_second"] == 100
    assert tokenizers["text"].decode(corpus[0].text) == PICTURES[0].stem.replace("_", " ")
    assert np.array_equal(corpus[0].image, tokenizers["image"].encode(PICTURES[0]).numpy())
    # Clips of a corpus are at 16 kHz, whatever the tokenizer works at: 40 ms are 640 samples.
    assert len(corpus[0].speech) == -(-8000 // 640) * 4


def test_a_model_learns_from_them(corpus, model):
    batch = next(PackedSequences(corpus, default_ranges(corpus), sequence_length=256, batch_size=2, axes=1))
    batch = {key: batch[key] for key in ("input_ids", "labels", "modality_ids", "position_ids")}
    assert set(batch["modality_ids"].unique().tolist()) == {0, 1, 2}
    out = model(**batch)
    assert out.loss.isfinite()
    out.loss.backward()


def test_a_model_generates_through_them(model, tokenizers, tmp_path):
    (picture,) = generate(model, {"text": "a pig"}, "image", tokenizers=tokenizers, seed=0)
    assert picture.ids.shape == (16,)
    assert picture.raw.shape == (8, 8, 3)
    (clip,) = generate(model, {"image": PICTURES[0]}, "speech", tokenizers=tokenizers, seed=0, max_new_tokens=40)
    assert clip.sample_rate == 8_000
    assert clip.raw.ndim == 1
    (told,) = generate(
        model, {"speech": (read_clip(), 16_000)}, "text", tokenizers=tokenizers, seed=0, max_new_tokens=8
    )
    assert isinstance(told.raw, str)
