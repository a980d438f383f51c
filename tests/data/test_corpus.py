"""The corpus that ships: what is in it, that its splits do not leak, and that damage is told."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from omnimoe.data import Corpus, CorpusError, check_leaks, shipped_corpora
from omnimoe.data.splits import SPLITS, LeakError
from omnimoe.data.texts import DIGIT_WORDS, WORDNET, headwords
from omnimoe.data.tokenize import TOKENIZERS, tokenize_corpus
from omnimoe.tokenizers.base import load_tokenizer

SHIPPED = Path(str(files("omnimoe.data"))) / "shipped" / "p"


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.load("p")


def test_no_leaks(corpus: Corpus) -> None:
    counts = check_leaks(corpus.as_leak_rows())
    assert sum(counts.values()) == len(corpus)
    assert all(counts[split] > 200 for split in SPLITS)


def test_no_loose_leaks_of_captions_and_headwords(corpus: Corpus) -> None:
    tokenizer = load_tokenizer("text")
    rows = list(corpus.as_leak_rows(tokenizer))
    entries = []
    for index in corpus.select_documents("train", sources=("wordnet", "jargon")):
        text = tokenizer.decode(corpus.texts[int(corpus.documents["text"][index])])
        if corpus.meta["sources"][corpus.documents["source"][index]] == "wordnet":
            heads = headwords(WORDNET, "", text)
        else:
            # Entries of the Jargon File begin with the headword and how it is said or what part of speech it is.
            heads = [re.split(r",| /| \[| \(| \d\.| (?:n|vt|vi|v|adj|adv|interj)\b", text)[0]]
        entries.append({"split": "train", "heads": heads})
    assert len(entries) > 20_000
    check_leaks(rows, entries)
    assert any(row["text"] == "goggles" and row["split"] == "test" for row in rows)
    with pytest.raises(LeakError, match="'goggle'"):
        check_leaks(rows, [*entries, {"split": "train", "heads": ["goggle"]}])


def test_three_modalities_of_every_split(corpus: Corpus) -> None:
    summary = corpus.summary()
    assert summary["train"]["triples"] > 10_000
    assert summary["train"]["groups"] > 2_000
    for split in SPLITS:
        assert summary[split]["triples"] > 100
        assert len(corpus.select(split, having=("image", "speech"))) == summary[split]["triples"]
    assert summary["train"]["running_text_tokens"] > 1_000_000
    assert summary["drawing"]["running_text_tokens"] == 0


def test_drawings_show_concepts_of_train(corpus: Corpus) -> None:
    train = set(corpus.rows["group"][corpus.select("train")].tolist())
    assert {row.group for row in corpus.examples("drawing")} <= train


def test_ids_are_those_of_the_shipped_tokenizers(corpus: Corpus) -> None:
    for modality, name in TOKENIZERS.items():
        tokenizer = load_tokenizer(name)
        assert corpus.vocab_sizes[modality] == tokenizer.vocab_size
        assert corpus.meta["num_tokens"][modality] == tokenizer.num_tokens


def test_codes_are_used_widely(corpus: Corpus) -> None:
    assert len(np.unique(corpus.images)) > corpus.vocab_sizes["image"] * 0.8
    assert len(np.unique(corpus.clips.values)) > corpus.vocab_sizes["speech"] * 0.3


def test_a_row_decodes(corpus: Corpus) -> None:
    row = next(row for row in corpus.examples("train", sources=("digits",)))
    assert row.get("image") is row.image
    assert load_tokenizer("text").decode(row.text) in DIGIT_WORDS
    assert row.style == "handwritten"
    assert row.image is not None
    assert row.image.shape == (64,)
    picture = load_tokenizer("picture").decode(row.image)
    assert picture.shape == (64, 64, 3)
    assert picture[:3].mean() > 200
    assert picture[20:44, 20:44].mean() < 200
    assert row.speech is not None
    assert len(load_tokenizer("speech").decode(row.speech)) > 4_000


def test_captions_are_distinct_and_held_out(corpus: Corpus) -> None:
    train, test = corpus.captions("train"), corpus.captions("test")
    assert len(set(test)) == len(test) > 200
    assert not {caption.lower() for caption in train} & {caption.lower() for caption in test}


def test_other_languages_name_the_same_pictures(corpus: Corpus) -> None:
    german = corpus.select("train", languages=("de",))
    assert len(german) > 1_000
    assert (corpus.rows["image"][german] >= 0).all()
    assert len(corpus.select("train", languages=None)) > len(corpus.select("train")) + len(german)


def test_a_corpus_without_english_is_counted_in_what_it_has(corpus: Corpus) -> None:
    names = [name.replace("en", "xx") for name in corpus.meta["languages"]]
    german = dataclasses.replace(corpus, meta={**corpus.meta, "languages": names})
    assert (german.main_languages, corpus.main_languages) == (None, ("en",))
    counts = german.summary()["test"]
    assert counts["triples"] == len(german.select("test", languages=None, having=("text", "image", "speech"))) > 0


def test_unknown_names_are_told(corpus: Corpus) -> None:
    with pytest.raises(CorpusError, match=r"no corpus 'q'.*shipped: p"):
        Corpus.load("q")
    with pytest.raises(CorpusError, match="unknown split 'dev'; this corpus has train, val, test, drawing"):
        corpus.select("dev")
    with pytest.raises(CorpusError, match="unknown language 'xx'"):
        corpus.select("train", languages=("xx",))
    with pytest.raises(CorpusError, match="unknown source 'coco'"):
        corpus.select_documents("train", sources=("coco",))
    with pytest.raises(CorpusError, match="unknown modality 'video'"):
        corpus[0].get("video")
    with pytest.raises(CorpusError, match="unknown modality 'video'"):
        corpus.select("train", having=("video",))


def test_a_folder_loads_and_damage_is_told(corpus: Corpus, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(SHIPPED, folder)
    assert len(Corpus.load(folder)) == len(corpus)

    meta = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps({**meta, "vocab_sizes": {**meta["vocab_sizes"], "image": 8}}))
    with pytest.raises(CorpusError, match="has a image id"):
        Corpus.load(folder)
    (folder / "corpus.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(CorpusError, match="format 99"):
        Corpus.load(folder)
    (folder / "tokens.npz").write_bytes((folder / "tokens.npz").read_bytes()[:1000])
    with pytest.raises(CorpusError, match="damaged"):
        Corpus.load(folder)
    (folder / "tokens.npz").unlink()
    with pytest.raises(CorpusError, match=r"tokens\.npz is missing"):
        Corpus.load(folder)
    with pytest.raises(CorpusError, match="not a built corpus"):
        tokenize_corpus(folder, tmp_path / "out")


def test_licences_lie_beside_it_and_it_is_small() -> None:
    assert shipped_corpora() == ["p"]
    page, credits = (SHIPPED / "LICENSES.md").read_text(), (SHIPPED / "ATTRIBUTION").read_text()
    for name in ("Twemoji", "EmojiOne", "Streamline", "Alpaydin", "Princeton", "Microsoft", "Unicode"):
        assert name in page
        assert name in credits
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 6_000_000


def test_a_built_folder_is_tokenized_on_first_use(tmp_path: Path) -> None:
    lines = [
        {
            "source": "emoji",
            "text": text,
            "lang": "en",
            "image": i,
            "audio": i,
            "key": text,
            "group": text,
            "split": split,
        }
        for i, (text, split) in enumerate([("lion", "train"), ("apple", "test")])
    ]
    rows = [{**line, "style": "noto", "license": "Apache-2.0"} for line in lines]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    document = {
        "source": "kjv",
        "key": "kjv 1",
        "text": "In the beginning",
        "lang": "en",
        "split": "train",
        "license": "x",
    }
    (tmp_path / "text.jsonl").write_text(json.dumps(document))
    np.save(tmp_path / "images.npy", np.full((2, 64, 64, 3), 200, np.uint8))
    np.save(tmp_path / "audio.npy", (np.sin(np.arange(3200) * 0.2) * 9000).astype(np.int16))
    np.save(tmp_path / "audio_offsets.npy", np.array([0, 1600, 3200]))
    corpus = Corpus.load(tmp_path)
    assert (tmp_path / "tokens" / "tokens.npz").exists()
    assert [corpus[i].split for i in range(2)] == ["train", "test"]
    assert load_tokenizer("text").decode(corpus[1].text) == "apple"
    assert corpus[0].image is not None
    assert corpus[0].image.shape == (64,)
    assert corpus[0].speech is not None
    assert len(corpus.documents["text"]) == 1
