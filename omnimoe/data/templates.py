"""Templates: tasks made of a row and of others beside it, such as naming a picture or choosing one of four.

A template is a function from a :class:`Scene` to spans, each of which says whether it is learned, that is, carries
labels; None where the row does not lend itself. ``PackedSequences(..., templates={"tell": 0.5, "name_it": 0.5})`` mixes
them. Without that argument rows are told as ever, which the template ``tell`` does too.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from omnimoe.data.corpus import MODALITIES, Corpus, Example
from omnimoe.data.documents import DocumentBuilder, Piece, SequenceError, lay_out
from omnimoe.registry import Registry
from omnimoe.tokenizers.base import Tokenizer, load_tokenizer

_LETTERS = "abcd"
_TRIES = 40


@dataclass(frozen=True, kw_only=True)
class Span:
    """A span of a document: local ids ``(n,)`` of a modality, and whether they carry labels."""

    modality: str
    ids: np.ndarray
    learned: bool = False


@dataclass(frozen=True, kw_only=True)
class Template:
    """A registered template.

    Args:
        name: its name.
        needs: modalities that the row must have.
        tell: gives the spans of a scene, or None where it cannot.
    """

    name: str
    needs: tuple[str, ...]
    tell: Callable[[Scene], list[Span] | None]


TEMPLATES: Registry[Template] = Registry("template")
TEMPLATES.on_first_use(lambda: importlib.import_module("omnimoe.data.tasks"))


def register_template(
    name: str, *, needs: Sequence[str] = ("text",), exist_ok: bool = False
) -> Callable[[Callable[[Scene], list[Span] | None]], Callable[[Scene], list[Span] | None]]:
    """Decorator that files a template function under ``name``.

    Args:
        name: as in :meth:`omnimoe.registry.Registry.register`.
        needs: modalities that a row must have.
        exist_ok: replace one of the same name.

    Example:
        >>> @register_template("spell_it", needs=("speech", "text"))
        ... def spell_it(scene):
        ...     return [scene.own("speech"), scene.words("spell it: "), scene.own("text", learned=True)]
        >>> TEMPLATES.remove("spell_it")
    """
    unknown = [modality for modality in needs if modality not in MODALITIES]
    if unknown:
        raise SequenceError(f"template {name!r} needs {unknown[0]!r}; a row has {', '.join(MODALITIES)}")

    def file_under(tell: Callable[[Scene], list[Span] | None]) -> Callable[[Scene], list[Span] | None]:
        TEMPLATES.register(name, exist_ok=exist_ok)(Template(name=name, needs=tuple(needs), tell=tell))
        return tell

    return file_under


class Scene:
    """A row, the rows of its split, and chance: what a template tells with.

    Attributes:
        row: the row.
        random: drawn from alone, so that the same seed and epoch give the same document.
        longest: tokens that a document may have.
    """

    def __init__(self, teller: Teller, row: Example, random: np.random.Generator) -> None:
        self._teller, self.row, self.random = teller, row, random
        self.longest = teller.longest

    def words(self, text: str, *, learned: bool = False) -> Span:
        """A text of the template's own, such as a question."""
        return Span(modality="text", ids=self._teller.encode(text), learned=learned)

    def own(self, modality: str, *, learned: bool = False) -> Span:
        """The row's text, picture or speech."""
        return self.of(self.row, modality, learned=learned)

    def has(self, modality: str) -> bool:
        """Whether the row has a text, picture or speech that is wanted."""
        return modality in self._teller.builder.modalities and self.row.get(modality) is not None

    def of(self, row: Example, modality: str, *, learned: bool = False) -> Span:
        """The text, picture or speech of a row."""
        ids = row.get(modality)
        if ids is None:
            raise SequenceError(f"row {row.index} has no {modality}; a template must say that it needs it")
        return Span(modality=modality, ids=ids, learned=learned)

    def orders(self) -> list[tuple[str, ...]]:
        """Every order of two or three of the row's modalities that fits."""
        return self._teller.builder.orders(self.row, self.longest)

    def others(
        self, count: int, modality: str, *, topic: str | None = None, beside: Sequence[Example] = ()
    ) -> list[Example] | None:
        """Rows of the same split about other things, distinct in concept and caption; None if none were found.

        Args:
            count: how many.
            modality: that they have.
            topic: ``"same"`` or ``"other"`` as the row's topic; None for any.
            beside: rows chosen before, which they must differ from too.
        """
        return self._teller.others(self, count, modality, topic, beside)

    def drawings(self) -> list[Example]:
        """Rows of the same split and caption with other pictures."""
        return self._teller.drawings(self.row)

    def translations(self) -> list[Example]:
        """Rows with the same picture and a caption in another language."""
        return self._teller.translations(self.row)

    def choice(self, options: Sequence[Example], right: int, modality: str) -> list[Span]:
        """``a: ... b: ...`` for each option, then the letter of the right one, which alone is learned."""
        spans = []
        for letter, option in zip(_LETTERS, options, strict=False):
            spans += [self.words(f" {letter}: "), self.of(option, modality)]
        return [*spans, self.words(" answer: "), self.words(_LETTERS[right], learned=True)]

    def shuffled(self, right: Example, wrong: Sequence[Example]) -> tuple[list[Example], int]:
        """The right and the wrong rows in random order, and the place of the right one."""
        place = int(self.random.integers(len(wrong) + 1))
        return [*wrong[:place], right, *wrong[place:]], place


class Teller:
    """Tells rows by templates.

    Args:
        builder: the vocabulary.
        rows: rows of the split, ``(n,)``, from which others are chosen.
        mixture: template to weight.
        seed: of all choices.
        longest: tokens that a document may have.
        tokenizer: of the corpus' text; None for the shipped one.

    Raises:
        RegistryError: if a template is unknown.
        SequenceError: if a weight is not positive, or the tokenizer is not the corpus'.
    """

    def __init__(
        self,
        builder: DocumentBuilder,
        rows: np.ndarray,
        mixture: Mapping[str, float],
        *,
        seed: int,
        longest: int,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if not mixture or any(not weight > 0 for weight in mixture.values()):
            raise SequenceError(f"templates must be a mapping of names to positive weights, got {dict(mixture)!r}")
        self.builder, self.seed, self.longest = builder, seed, longest
        self.corpus: Corpus = builder.corpus
        self._templates = [TEMPLATES.get(name) for name in mixture]
        total = sum(mixture.values())
        self._weights = np.array([weight / total for weight in mixture.values()])
        self._tokenizer = tokenizer or load_tokenizer("text")
        if self._tokenizer.vocab_size != self.corpus.vocab_sizes["text"]:
            raise SequenceError(
                f"the text tokenizer has {self._tokenizer.vocab_size} ids, the corpus was made with "
                f"{self.corpus.vocab_sizes['text']}; pass text_tokenizer"
            )
        self.rows = rows
        columns = {"text": "text", "image": "image", "speech": "audio"}
        self._having = {name: rows[self.corpus.rows[column][rows] >= 0] for name, column in columns.items()}
        self._words: dict[str, np.ndarray] = {}

    def encode(self, text: str) -> np.ndarray:
        """Ids of a template's own words, remembered."""
        if text not in self._words:
            self._words[text] = np.asarray(self._tokenizer.encode(text), dtype=np.int64)
        return self._words[text]

    def piece(self, row: int, epoch: int) -> Piece | None:
        """The document of a row in an epoch, the same each time; None if no template can tell it."""
        example = self.corpus[row]
        random = np.random.default_rng([self.seed, epoch, 3, row])
        remaining = list(range(len(self._templates)))
        while remaining:
            weights = self._weights[remaining]
            template = self._templates[remaining.pop(int(random.choice(len(remaining), p=weights / weights.sum())))]
            usable = all(n in self.builder.modalities and example.get(n) is not None for n in template.needs)
            spans = template.tell(Scene(self, example, random)) if usable else None
            if spans is not None and self._length(spans) <= self.longest:
                return self._laid_out(spans)
        return None

    def others(
        self, scene: Scene, count: int, modality: str, topic: str | None, beside: Sequence[Example]
    ) -> list[Example] | None:
        """See :meth:`Scene.others`."""
        rows, table = self._having[modality], self.corpus.rows
        topics = table.get("topic")
        own = scene.row
        if topic is not None and (topics is None or topics[own.index] < 0):
            return None
        found: list[Example] = []
        seen = {(row.group, row.text.tobytes()) for row in (own, *beside)}
        for _ in range(_TRIES * count):
            index = int(rows[scene.random.integers(len(rows))]) if len(rows) else own.index
            if topic is not None and topics is not None:
                alike = topics[index] == topics[own.index]
                if topics[index] < 0 or alike != (topic == "same"):
                    continue
            other = self.corpus[index]
            if any(other.group == group or other.text.tobytes() == text for group, text in seen):
                continue
            seen.add((other.group, other.text.tobytes()))
            found.append(other)
            if len(found) == count:
                return found
        return None

    def drawings(self, row: Example) -> list[Example]:
        """See :meth:`Scene.drawings`."""
        table = self.corpus.rows
        alike = self._by_text.get(int(table["text"][row.index]), [])
        own = table["image"][row.index]
        first: dict[int, int] = {}
        for index in alike:
            if table["image"][index] not in (-1, own):
                first.setdefault(int(table["image"][index]), index)
        return [self.corpus[index] for index in first.values()]

    def translations(self, row: Example) -> list[Example]:
        """See :meth:`Scene.translations`."""
        image = int(self.corpus.rows["image"][row.index])
        alike = self._by_image.get(image, []) if image >= 0 else []
        return [other for other in map(self.corpus.__getitem__, alike) if other.lang != row.lang]

    @functools.cached_property
    def _by_text(self) -> dict[int, list[int]]:
        return _grouped(self.corpus.rows["text"], self.rows)

    @functools.cached_property
    def _by_image(self) -> dict[int, list[int]]:
        # All languages, though the rows told may be of one.
        split = self.corpus.rows["split"][self.rows[0]] if len(self.rows) else -1
        return _grouped(self.corpus.rows["image"], np.flatnonzero(self.corpus.rows["split"] == split))

    def _length(self, spans: Sequence[Span]) -> int:
        return 2 + sum(len(s.ids) + (0 if self.builder.ranges[s.modality].begin_id is None else 2) for s in spans)

    def _laid_out(self, spans: Sequence[Span]) -> Piece:
        builder = self.builder
        piece = lay_out(
            [(span.modality, span.ids) for span in spans],
            builder.ranges,
            bos_id=builder.bos_id,
            eos_id=builder.eos_id,
            grids=self.corpus.grids,
        )
        learned = [False]
        for span in spans:
            markers = 0 if builder.ranges[span.modality].begin_id is None else 2
            # The begin marker too: that a picture comes next is part of the answer.
            learned += [span.learned] * (len(span.ids) + markers)
        learned.append(spans[-1].learned)
        return Piece(
            ids=piece.ids, modality_ids=piece.modality_ids, positions=piece.positions, learned=np.array(learned)
        )


def _grouped(column: np.ndarray, rows: np.ndarray) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for row in rows.tolist():
        groups.setdefault(int(column[row]), []).append(row)
    return groups
