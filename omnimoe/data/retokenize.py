"""A tokenized corpus with its texts in another tokenizer's ids, for models that read texts with their own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from omnimoe.data.corpus import Corpus, shipped_corpora
from omnimoe.data.tokenize import encode_all, ragged
from omnimoe.tokenizers.base import Tokenizer, load_tokenizer


def retokenize_corpus(
    corpus: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    written_with: Tokenizer | None = None,
) -> Path:
    """Writes a corpus anew with other ids for its texts; pictures and clips stay as they are.

    Args:
        corpus: a shipped corpus by name, or a folder of tokens.
        out: folder to write, made if need be.
        tokenizer: of the new ids, such as ``hf_text`` over a published model's.
        written_with: the tokenizer of the old ids, which must give texts back exactly; None for the shipped one.

    Returns:
        ``out``.

    Raises:
        CorpusError: if there is no such corpus, or new ids do not fit the file format, which ends at 65,535.
    """
    held, out = Corpus.load(corpus), Path(out).expanduser()
    old = load_tokenizer("text") if written_with is None else written_with
    texts = encode_all(tokenizer, [old.decode(held.texts[index]) for index in range(len(held.texts))], "text")
    encoded = ragged("text", texts)
    if str(corpus).lower() in shipped_corpora():
        with as_file(files("omnimoe.data") / "shipped" / str(corpus).lower()) as folder:
            return _write(folder, out, encoded, tokenizer)
    return _write(_tokens_of(Path(corpus).expanduser()), out, encoded, tokenizer)


def _tokens_of(folder: Path) -> Path:
    return folder if (folder / "tokens.npz").is_file() else folder / "tokens"


def _write(folder: Path, out: Path, encoded: dict[str, Any], tokenizer: Tokenizer) -> Path:
    with np.load(folder / "tokens.npz", allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files} | encoded
    meta = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    meta["vocab_sizes"]["text"] = int(tokenizer.vocab_size)
    # a place in texts of other lengths is another place
    own = hashlib.sha256(encoded["text_lengths"].tobytes() + encoded["text_values"].tobytes()).hexdigest()
    meta["rows_sha256"] = hashlib.sha256((meta["rows_sha256"] + own).encode()).hexdigest()
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "tokens.partial.npz"
    np.savez_compressed(partial, **arrays)
    (out / "corpus.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in ("LICENSES.md", "ATTRIBUTION"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    partial.rename(out / "tokens.npz")
    return out
