"""Templates: tasks made of a row and of others beside it, such as naming a picture or choosing one of four.

A template is a function from a :class:`Scene` to spans, each of which says whether it is learned, that is, carries
labels; None where the row does not lend itself. ``PackedSequences(..., templates={"tell": 0.5, "name_it": 0.5})`` mixes
them. Without that argument rows are told as ever, which the template ``tell`` does too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from omnimoe.data.corpus import MODALITIES, Corpus, Example
from omnimoe.data.documents import DocumentBuilder, Piece, SequenceError, lay_out
from omnimoe.registry import Registry
from omnimoe.tokenizers.base import Tokenizer, load_tokenizer

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LANGUAGES = {
    "be": "Belarusian",
    "bg": "Bulgarian",
    "ca": "Catalan",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "it": "Italian",
    "nl": "Dutch",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
}
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

    def of(self, row: Example, modality: str, *, learned: bool = False) -> Span:
        """The text, picture or speech of a row."""
        ids = row.get(modality)
        if ids is None:
            raise SequenceError(f"row {row.index} has no {modality}; a template must say that it needs it")
        return Span(modality=modality, ids=ids, learned=learned)

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


@register_template("tell", needs=())
def tell(scene: Scene) -> list[Span] | None:
    """The row in a random order of two or three of its modalities, all of it learned."""
    orders = scene._teller.builder.orders(scene.row, scene.longest)
    if not orders:
        return None
    order = orders[int(scene.random.integers(len(orders)))]
    return [scene.own(modality, learned=True) for modality in order]


@register_template("name_it", needs=("image", "text"))
def name_it(scene: Scene) -> list[Span]:
    """A picture; what is it?"""
    return [scene.own("image"), scene.words(" what is this? "), scene.own("text", learned=True)]


@register_template("draw_it", needs=("text", "image"))
def draw_it(scene: Scene) -> list[Span]:
    """A caption to draw."""
    return [scene.words("draw: "), scene.own("text"), scene.own("image", learned=True)]


@register_template("say_it", needs=("text", "speech"))
def say_it(scene: Scene) -> list[Span]:
    """A caption to say aloud."""
    return [scene.words("say: "), scene.own("text"), scene.own("speech", learned=True)]


@register_template("transcribe", needs=("speech", "text"))
def transcribe(scene: Scene) -> list[Span]:
    """Speech to write down."""
    return [scene.own("speech"), scene.words(" what was said? "), scene.own("text", learned=True)]


@register_template("which_picture", needs=("text", "image"))
def which_picture(scene: Scene) -> list[Span] | None:
    """Four pictures; which one does the caption name?"""
    wrong = scene.others(3, "image")
    if wrong is None:
        return None
    options, right = scene.shuffled(scene.row, wrong)
    return [scene.words("which is: "), scene.own("text"), scene.words("?"), *scene.choice(options, right, "image")]


@register_template("which_words", needs=("image", "text"))
def which_words(scene: Scene) -> list[Span] | None:
    """Four captions; which one names the picture?"""
    wrong = scene.others(3, "text")
    if wrong is None:
        return None
    options, right = scene.shuffled(scene.row, wrong)
    return [scene.own("image"), scene.words(" what is this?"), *scene.choice(options, right, "text")]


@register_template("odd_one_out")
def odd_one_out(scene: Scene) -> list[Span] | None:
    """Three of one topic and one of another, in pictures where four fit, else in words.

    In a corpus without topics, three drawings of one thing and one of another.
    """
    modality = "image" if scene.row.image is not None and scene.longest >= 300 else "text"
    alike = scene.others(2, modality, topic="same")
    stranger = scene.others(1, modality, topic="other", beside=alike or ())
    if alike is None and modality == "image":
        alike, stranger = scene.drawings()[:2], scene.others(1, modality)
    if alike is None or stranger is None or len(alike) < 2:
        return None
    options, right = scene.shuffled(stranger[0], [scene.row, *alike])
    return [scene.words("which is the odd one out?"), *scene.choice(options, right, modality)]


@register_template("continue_it")
def continue_it(scene: Scene) -> list[Span] | None:
    """Two or three things in turn, in pictures or words; what comes next?"""
    modality = "image" if scene.row.image is not None and scene.longest >= 300 else "text"
    period = 2 if modality == "image" else int(scene.random.integers(2, 4))
    others = scene.others(period - 1, modality)
    if others is None:
        return None
    cycle = [scene.row, *others]
    shown = period + 1 + (0 if modality == "image" else int(scene.random.integers(period)))
    spans = [scene.words("continue: ")]
    for place in range(shown):
        spans += [scene.of(cycle[place % period], modality), scene.words(", ")]
    return [*spans, scene.of(cycle[shown % period], modality, learned=True)]


@register_template("count_them", needs=("image",))
def count_them(scene: Scene) -> list[Span] | None:
    """Copies of a picture; how many?"""
    image = scene.own("image")
    most = min(5, (scene.longest - 16) // (len(image.ids) + 2))
    if most < 1:
        return None
    count = int(scene.random.integers(1, most + 1))
    return [*[image] * count, scene.words(" how many? "), scene.words(NUMBERS[count - 1], learned=True)]


@register_template("translate")
def translate(scene: Scene) -> list[Span] | None:
    """A caption to give in another language, either way."""
    found = scene.translations()
    if not found:
        return None
    other = found[int(scene.random.integers(len(found)))]
    given, wanted = (scene.row, other) if scene.random.random() < 0.5 else (other, scene.row)
    asked = scene.words(f" in {LANGUAGES.get(wanted.lang, wanted.lang)}: ")
    return [scene.of(given, "text"), asked, scene.of(wanted, "text", learned=True)]
