"""The templates that come with the package; each function is one task."""

from __future__ import annotations

from omnimoe.data.templates import Scene, Span, register_template

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


@register_template("tell", needs=())
def tell(scene: Scene) -> list[Span] | None:
    """The row in a random order of two or three of its modalities, all of it learned."""
    orders = scene.orders()
    if not orders:
        return None
    order = orders[int(scene.random.integers(len(orders)))]
    return [scene.own(modality, learned=True) for modality in order]


@register_template("alone", needs=())
def alone(scene: Scene) -> list[Span] | None:
    """The row's picture or clip with nothing before it: what classifier-free guidance holds against the prompt."""
    present = [modality for modality in ("image", "speech") if scene.has(modality)]
    if not present:
        return None
    return [scene.own(present[int(scene.random.integers(len(present)))], learned=True)]


@register_template("caption_first", needs=("text", "image"))
def caption_first(scene: Scene) -> list[Span]:
    """The caption and its picture, all of it learned: more of what a prompt for a picture looks like."""
    return [scene.own("text", learned=True), scene.own("image", learned=True)]


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
