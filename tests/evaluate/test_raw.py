"""Raw pictures and clips by the rows of the token corpus."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from omnimoe.data.corpus import CorpusError
from omnimoe.evaluate import RawCorpus
from omnimoe.tokenizers import load_tokenizer


def test_rows_of_both_are_the_same_rows(raw_folder, small):
    raw = RawCorpus(raw_folder, small)
    words, pictures = load_tokenizer("text"), load_tokenizer("picture")
    for index in (0, 7, len(small) - 1):
        example = small[index]
        assert raw.text(index) == words.decode(example.text)
        picture = raw.picture(index)
        assert picture.dtype == np.uint8
        assert pictures.encode(picture).tolist() == example.image.tolist()
        clip = raw.clip(index)
        assert clip.dtype == np.float32
        assert 0 < np.abs(clip).max() <= 1
        assert len(load_tokenizer("speech").encode(clip)) == len(example.speech)


def test_a_row_without_a_picture_or_a_clip(raw_folder, tmp_path):
    from omnimoe.data import Corpus

    folder = tmp_path / "bare"
    shutil.copytree(raw_folder, folder, ignore=shutil.ignore_patterns("tokens"))
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    rows[0] |= {"image": -1, "audio": -1}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    raw = RawCorpus(folder, Corpus.load(folder))
    assert raw.picture(0) is None
    assert raw.clip(0) is None
    assert raw.picture(1) is not None


def test_another_corpus_or_no_corpus_is_refused(raw_folder, corpus, tmp_path):
    with pytest.raises(CorpusError, match="is not what corpus 'p' was made from"):
        RawCorpus(raw_folder, corpus)
    with pytest.raises(CorpusError, match=r"is not a built corpus: rows.jsonl, images.npy"):
        RawCorpus(tmp_path, corpus)
