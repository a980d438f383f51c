"""What a metric is given: the models, the held-out concepts, the raw material behind them, and the means to use both.

A concept is a component of the corpus: all rows that share a name, a picture or a clip, so all drawings of one thing.
Metrics take one row of each concept, so that their trials are independent, and all take the same concepts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from omnimoe.data import Corpus
from omnimoe.data.corpus import MODALITIES, Example
from omnimoe.data.tokenize import TOKENIZERS
from omnimoe.evaluate.base import EvaluationError
from omnimoe.evaluate.raw import RawCorpus
from omnimoe.generate import Generated, generate
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.tokenizers import Tokenizer, load_tokenizer
from omnimoe.tokenizers.speech import SAMPLE_RATE
from omnimoe.train.data import check_ranges

T = TypeVar("T")

SAMPLING: dict[str, dict[str, Any]] = {
    "image": {"temperature": 0.9, "top_k": 100},
    "speech": {"temperature": 0.8, "top_k": 50},
    "text": {"temperature": 0.0},
}
"""How each modality is sampled where the caller says nothing."""
_UNCUT: dict[str, Any] = {"top_p": 1.0, "min_p": 0.0, "guidance": 1.0}
"""Beside it, said outright, so that models which bring choices of their own are sampled like the others."""


@dataclass(kw_only=True)
class Bench:
    """What metrics read. :func:`omnimoe.evaluate.evaluate` makes it.

    Args:
        models: label to model, in evaluation mode.
        corpus: the token corpus.
        split: of it, held out.
        raw: the pictures and clips behind the tokens, or None: then what the tokens decode to stands for them.
        num: most concepts that a metric uses; None for all.
        candidates: sizes of the sets that the right one is to be found in.
        seed: draws concepts, candidates and samples.
        batch_size: sequences, pictures or clips handled at once.
        out: folder for contact sheets and clips; None writes none.
        tokenizers: modality to tokenizer; those that ship with the package where a name is missing.
        sampling: options of ``omnimoe.generate.generate`` by modality, over :data:`SAMPLING`.
        saved_sampling: sample each model as it was saved to be, and not by :data:`SAMPLING`.
        device: where encoders run; models stay where they are.
        show_progress: draw bars on a terminal.
        notes: what the reader of a metric must know; metrics add to it with :meth:`note`.
        sheets: file and caption of every contact sheet written.
        sounds: file and caption of every clip written.
        loaded: tokenizers loaded so far.
    """

    models: Mapping[str, OmniMoeForCausalLM]
    corpus: Corpus
    split: str = "test"
    raw: RawCorpus | None = None
    num: int | None = 100
    candidates: Sequence[int] = (4, 10)
    seed: int = 0
    batch_size: int = 16
    out: Path | None = None
    tokenizers: Mapping[str, Tokenizer] = field(default_factory=dict)
    sampling: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    saved_sampling: bool = False
    device: torch.device | str = "cpu"
    show_progress: bool = False
    notes: list[str] = field(default_factory=list)
    sheets: list[tuple[Path, str]] = field(default_factory=list)
    sounds: list[tuple[Path, str]] = field(default_factory=list)
    loaded: dict[str, Tokenizer] = field(default_factory=dict, repr=False)

    def modalities(self, model: OmniMoeForCausalLM) -> tuple[str, ...]:
        """Modalities that a model and the corpus share.

        Raises:
            DataMismatchError: if the corpus does not fit the model.
        """
        held = check_ranges(model.config, self.corpus)
        return tuple(name for name in MODALITIES if name in held)

    @property
    def longest(self) -> int:
        """Tokens of the longest document that every model was made for."""
        return min((model.config.max_position_embeddings for model in self.models.values()), default=2**20)

    def rows(self, *having: str, split: str | None = None) -> np.ndarray:
        """``(n,)`` int64: rows of a split in English, or in all languages of a corpus without English."""
        return self.corpus.select(split or self.split, languages=self.corpus.main_languages, having=having)

    def concepts(self, *having: str, split: str | None = None, num: int | None = -1) -> list[Example]:
        """One row, as :meth:`rows` has them, for each held-out concept that has all of some modalities.

        The order is drawn from the seed and the concept alone, so metrics that ask for other modalities or another
        number get the same concepts where they can.

        Args:
            having: modalities.
            split: the bench's own where None.
            num: at most so many; -1 for :attr:`num`, None for all.

        Raises:
            EvaluationError: if there is none.
        """
        rows = self.rows(*having, split=split)
        groups = self.corpus.rows["group"][rows]
        chosen = []
        for group in np.unique(groups):
            generator = np.random.default_rng([self.seed, int(group)])
            place = generator.random()
            members = rows[groups == group]
            chosen.append((place, int(members[int(generator.random() * len(members))])))
        examples = [self.corpus[row] for _, row in sorted(chosen)]
        examples = [example for example in examples if self.length(example) <= self.longest]
        if not examples:
            raise EvaluationError(
                f"split {split or self.split!r} of corpus {self.corpus.name!r} has no row with "
                f"{' and '.join(having)}; choose another split or leave the metric out"
            )
        num = self.num if num == -1 else num
        return examples if num is None else examples[:num]

    def drawings(self, group: int, split: str | None = None) -> list[Example]:
        """Rows of one concept, one for each distinct picture."""
        rows = self.rows("image", split=split)
        rows = rows[self.corpus.rows["group"][rows] == group]
        first = dict(zip(self.corpus.rows["image"][rows][::-1].tolist(), rows[::-1].tolist(), strict=True))
        return [self.corpus[row] for row in sorted(first.values())]

    def wrong_ones(self, index: int, total: int, count: int) -> list[int]:
        """``count`` of ``total`` concepts without the one at ``index``, drawn from the seed; the first k of more are
        those of k."""
        order = np.random.default_rng([self.seed, 1, index]).permutation(total)
        return [int(other) for other in order if other != index][:count]

    def tokenizer(self, modality: str) -> Tokenizer:
        """The tokenizer of a modality, loaded once."""
        if modality in self.tokenizers:
            return self.tokenizers[modality]
        if modality not in self.loaded:
            self.loaded[modality] = load_tokenizer(TOKENIZERS[modality])
        return self.loaded[modality]

    def caption(self, example: Example) -> str:
        """The caption of a row as text, empty where it has none."""
        if self.corpus.rows["text"][example.index] < 0:
            return ""
        return str(self.tokenizer("text").decode(torch.from_numpy(example.text))).strip()

    def decoded(self, example: Example) -> np.ndarray:
        """``(H, W, 3)`` uint8: what the ids of a row's picture decode to."""
        return self.tokenizer("image").decode(torch.from_numpy(np.asarray(example.image)))

    def picture(self, example: Example) -> np.ndarray:
        """``(H, W, 3)`` uint8: the picture of a row; without a raw folder, what its ids decode to."""
        found = None if self.raw is None else self.raw.picture(example.index)
        return self.decoded(example) if found is None else found

    def clip(self, example: Example) -> np.ndarray:
        """``(n,)`` float32 at 16 kHz: the clip of a row; without a raw folder, what its ids decode to."""
        found = None if self.raw is None else self.raw.clip(example.index)
        return self.spoken(example) if found is None else found

    def spoken(self, example: Example) -> np.ndarray:
        """``(n,)`` float32 at 16 kHz: what the ids of a row's clip decode to."""
        tokenizer = self.tokenizer("speech")
        return at_16k(tokenizer.decode(torch.from_numpy(np.asarray(example.speech))), tokenizer)

    def generate(
        self, model: OmniMoeForCausalLM, documents: Sequence[Any], to: str, *, what: str = "", **options: Any
    ) -> list[Generated]:
        """:func:`omnimoe.generate.generate` in batches, with the sampling of the bench; one output a document."""
        usual = {} if self.saved_sampling else {**_UNCUT, **SAMPLING.get(to, {})}
        wanted = {**usual, **self.sampling.get(to, {}), **options}
        given = {name: self.tokenizer(name) for name in self.modalities(model)}
        made: list[Generated] = []
        for start in self.progress(range(0, len(documents), self.batch_size), what or f"generating {to}"):
            part = list(documents[start : start + self.batch_size])
            made += generate(model, part, to=to, seed=self.seed, tokenizers=given, **wanted)
        return made

    def progress(self, items: Sequence[T] | range, what: str) -> Iterable[Any]:
        """The items, with a bar on a terminal."""
        return tqdm(items, desc=what, leave=False, disable=None if self.show_progress else True)

    def note(self, text: str) -> None:
        """Adds a sentence to what is told below a metric's table, once."""
        if text not in self.notes:
            self.notes.append(text)

    def sheet(self, name: str, caption: str, draw: Callable[[Path], Any]) -> None:
        """Lets ``draw`` write a contact sheet ``name.png`` into the folder of the bench, if there is one."""
        if self.out is not None:
            path = self.out / f"{_file_name(name)}.png"
            draw(path)
            self.sheets.append((path, caption))

    def sound(self, name: str, caption: str, made: Generated) -> None:
        """Writes a clip ``name.wav`` into the folder of the bench, if there is one."""
        if self.out is not None:
            self.sounds.append((made.save(self.out / f"{_file_name(name)}.wav"), caption))

    def subset(self, rows: Sequence[int] | np.ndarray, documents: Sequence[int] | np.ndarray = ()) -> Corpus:
        """The corpus with some rows and some documents of running text only, and no interleaved documents."""
        kept, texts = np.asarray(rows, dtype=np.int64), np.asarray(documents, dtype=np.int64)
        return dataclasses.replace(
            self.corpus,
            rows={name: column[kept] for name, column in self.corpus.rows.items()},
            documents={name: column[texts] for name, column in self.corpus.documents.items()},
            interleaved=None,
        )

    def length(self, example: Example) -> int:
        """Most tokens that a document of a row can have."""
        spans = (example.text, example.image, example.speech)
        return 8 + sum(len(ids) for ids in spans if ids is not None)


def at_16k(waveform: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """What a tokenizer decoded, at 16 kHz."""
    if tokenizer.sample_rate in (None, SAMPLE_RATE):
        return waveform
    from torchaudio.functional import resample

    return resample(torch.from_numpy(waveform), tokenizer.sample_rate, SAMPLE_RATE).numpy()


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
