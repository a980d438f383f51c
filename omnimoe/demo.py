"""A page to try a model in: words, a picture or a sound in, words, pictures, sounds or a whole document out.

Gradio is imported when the page is built. Its analytics are off and its fonts are the system's, so that the page works
without a network.
"""

from __future__ import annotations

import html
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from omnimoe.flops import total_params
from omnimoe.generate import Generated, generate, interleave
from omnimoe.generation.pages import inline, kind_of
from omnimoe.generation.prompts import load_tokenizers, shipped_tokenizer
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.spans import bounded_ranges
from omnimoe.tokenizers import Tokenizer

ANY = "anything"
"""The target that lets the model choose."""
MOST = 8
"""Samples that can be asked for."""
SAMPLING = {"guidance": 1.0, "temperature": 0.9, "top_k": 100}
"""How the page samples from a model that does not say how."""
EXAMPLES = ("a red apple", "a lion", "the digit 7", "a blue car", "Flag: Japan")

_CSS = """
.gradio-container { width: 100% !important; max-width: 1220px !important; margin: 0 auto !important; }
#title h1 { margin: 0; font-size: 1.7rem; letter-spacing: -0.02em; }
#title p { margin: .15rem 0 0; opacity: .75; }
#pictures img { image-rendering: pixelated; }
#note { opacity: .75; }
#page section { display: flex; flex-wrap: wrap; align-items: center; gap: .7rem; padding: .9rem 1rem; margin: 0 0 .8rem;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary); border-radius: .6rem; }
#page img { width: 9rem; image-rendering: pixelated; border-radius: .4rem; border: 1px solid #8883; }
#page p { font-size: 1.05rem; margin: 0; } #page audio { height: 2.2rem; }
"""


def build_page(
    model: OmniMoeForCausalLM, *, name: str = "a model", tokenizers: Mapping[str, Tokenizer] | None = None
) -> Any:
    """The page, not yet served.

    Args:
        model: in evaluation mode.
        name: what the page calls it.
        tokenizers: as in :func:`omnimoe.generate.generate`.

    Returns:
        ``gradio.Blocks``, for :func:`serve`.

    Raises:
        ImportError: if Gradio is missing.
        GenerationError: if a tokenizer does not fit the model.
    """
    gradio = _gradio()
    session = _Session(model, tokenizers)
    told = f"{total_params(model.config) / 1e6:.1f} million parameters"
    # what was shown is deleted after an hour
    with gradio.Blocks(
        title=f"omnimoe: {name}", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
    ) as page:
        about = " &middot; ".join(html.escape(part) for part in (name, told, ", ".join(session.tokenizers)))
        gradio.HTML(f"<h1>omnimoe</h1><p>{about}</p>", elem_id="title")
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=5, min_width=340):
                given = _inputs(gradio, session)
                targets = [*session.tokenizers, ANY]
                first = "image" if "image" in targets else targets[0]
                target = gradio.Radio(targets, value=first, label="Make", elem_id="target")
                choices = _choices(gradio, session, first)
                button = gradio.Button("Generate", variant="primary", size="lg", elem_id="generate")
            with gradio.Column(scale=6, min_width=380):
                note = gradio.Markdown("Say what you want and press *Generate*.", elem_id="note")
                pictures = gradio.Gallery(
                    show_label=False, columns=4, height=420, object_fit="contain", format="png", elem_id="pictures"
                )
                text = gradio.Textbox(label="Text", lines=6, visible=False, elem_id="text", buttons=["copy"])
                whole = gradio.HTML(visible=False, elem_id="page")
                players = _players(gradio)
        outputs = [pictures, text, whole, note, *players]
        moved = [choices[name] for name in SAMPLING]
        target.change(lambda chosen: list(session.sampling(chosen).values()), target, moved, api_visibility="private")
        gradio.on(
            [button.click, *([given["text"].submit] if "text" in given else [])],
            session.handler(list(given), list(choices)),
            inputs=[target, *given.values(), *choices.values()],
            outputs=outputs,
            show_progress_on=[pictures, text, whole],
            api_name="generate",
        )
    return page


def serve(page: Any, *, port: int | None = None, host: str = "127.0.0.1", in_background: bool = False) -> str:
    """Serves a page until Ctrl-C.

    Args:
        page: of :func:`build_page`.
        port: a free one where None.
        host: address to listen at; ``"0.0.0.0"`` for other machines too.
        in_background: return at once; ``page.close()`` ends it.

    Returns:
        The page's address.

    Raises:
        ValueError: if the port is taken.
    """
    gradio = _gradio()
    if port is not None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ValueError(f"port {port} of {host} cannot be used: {error.strerror}; choose another") from None
    # names alone are the reader's own fonts; anything else would be fetched
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    _, address, _ = page.queue(default_concurrency_limit=1).launch(
        server_name=host,
        server_port=port or _free_port(host),
        share=False,
        quiet=True,
        ssr_mode=False,
        show_error=True,
        footer_links=[],
        prevent_thread_lock=True,
        theme=gradio.themes.Soft(primary_hue="blue", neutral_hue="slate", radius_size="md", **fonts),
        css=_CSS,
    )
    if not in_background:
        page.block_thread()
    return address


class _Session:
    """The model behind a page."""

    def __init__(self, model: OmniMoeForCausalLM, tokenizers: Mapping[str, Tokenizer] | None) -> None:
        self.model = model
        config = model.config
        known = [
            name for name in config.modality_names if name in (tokenizers or {}) or shipped_tokenizer(config, name)
        ]
        loaded = load_tokenizers(config, tokenizers, known)
        self.tokenizers = {name: loaded[name] for name in known}
        self.guided = [name for name in known if name in bounded_ranges(config) or name not in config.token_ranges]
        self.is_denoised = any(name not in config.token_ranges for name in known)

    def handler(self, given: list[str], choices: list[str]) -> Callable[..., Iterator[list[Any]]]:
        """What Gradio calls with the values of the target, the inputs and the choices; it yields what to show."""

        def answer(target: str, *values: Any) -> Iterator[list[Any]]:
            gradio = _gradio()
            document = self.document(dict(zip(given, values[: len(given)], strict=True)))
            options = dict(zip(choices, values[len(given) :], strict=True))
            try:
                yield from self.answers(target, document, options)
            except ValueError as error:
                raise gradio.Error(str(error), print_exception=False) from error

        return answer

    def document(self, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """The inputs that were given, in order; a sound of Gradio is ``(rate, samples)`` of 16-bit integers."""
        found: list[tuple[str, Any]] = []
        for name, value in values.items():
            if value is None or (isinstance(value, str) and not value.strip()):
                continue
            if isinstance(value, tuple):
                rate, samples = value
                scale = np.iinfo(samples.dtype).max if np.issubdtype(samples.dtype, np.integer) else 1
                wave = samples.astype(np.float32) / scale
                value = (wave.mean(axis=1) if wave.ndim == 2 else wave, rate)
            found.append((name, value.strip() if isinstance(value, str) else value))
        return found

    def sampling(self, target: str) -> dict[str, float]:
        """What the sliders show for a target: as the model was saved to be sampled, where it was."""
        saved = self._saved(target)
        usual = {"guidance": 1.0, "temperature": 1.0, "top_k": 0} if saved else SAMPLING
        return {name: saved.get(name, value) for name, value in usual.items()}

    def _saved(self, target: str) -> dict[str, float]:
        saved = getattr(self.model.generation_config, "sampling", None) or {}
        return saved.get(next(iter(saved), "") if target == ANY else target, {})

    def answers(self, target: str, document: list[tuple[str, Any]], options: Mapping[str, Any]) -> Iterator[list[Any]]:
        """What to show, text as it is written."""
        seed = options.get("seed")
        usual: dict[str, Any] = {
            "tokenizers": self.tokenizers,
            "seed": int(torch.randint(2**31, ())) if seed is None else int(seed),
            "num_samples": 1 if options["temperature"] == 0 else int(options["samples"]),
        }
        if "steps" in options and target not in self.model.config.token_ranges:
            usual["steps"] = int(options["steps"])
        shown = self.sampling(target) if self._saved(target) else {}
        for name in SAMPLING:
            # what was not moved is as saved, which may differ by modality and say more than the sliders do
            if options[name] != shown.get(name) and (name != "guidance" or target == ANY or target in self.guided):
                every = self.model.config.vocab_size
                usual[name] = (int(options[name]) or every) if name == "top_k" else options[name]
        note = f"seed {usual['seed']}"
        if target == ANY:
            told = interleave(self.model, document, **usual)
            yield _shown(whole=_whole(told), note=note)
        elif target == next(iter(self.model.config.token_ranges)) and usual["num_samples"] == 1:
            yield from (_shown(text=text, note=note) for text in self._streamed(document, target, usual))
        else:
            made = generate(self.model, document, to=target, **usual)
            kind = kind_of(made[0])
            if kind == "text":
                yield _shown(text="\n".join(found.raw.strip() for found in made), note=note)
            elif kind == "sound":
                yield _shown(sounds=made, note=note)
            else:
                yield _shown(pictures=[found.raw for found in made], note=note)

    def _streamed(self, document: list[tuple[str, Any]], target: str, options: dict[str, Any]) -> Iterator[str]:
        """The text so far, each time that it grows."""
        pieces: queue.Queue[str | None] = queue.Queue()
        failed: list[Exception] = []

        def write() -> None:
            try:
                generate(self.model, document, to=target, on_text=pieces.put, **options)
            except Exception as error:
                failed.append(error)
            finally:
                pieces.put(None)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        text = ""
        while (piece := pieces.get()) is not None:
            text += piece
            yield text
        thread.join()
        if failed:
            raise failed[0]
        yield text


def _inputs(gradio: Any, session: _Session) -> dict[str, Any]:
    """A component for each modality that can be given, text first and open, the others folded."""
    found: dict[str, Any] = {}
    kinds = {name: tokenizer.modality for name, tokenizer in session.tokenizers.items()}
    for name in (name for name, kind in kinds.items() if kind == "text"):
        found[name] = gradio.Textbox(
            label="Words", placeholder="a red apple", lines=2, autofocus=True, elem_id="words", submit_btn=False
        )
        gradio.Examples([[example] for example in EXAMPLES], found[name], label="Try")
    if any(kind in ("image", "speech") for kind in kinds.values()):
        with gradio.Accordion("A picture or a sound", open=False, elem_id="more"):
            for name, kind in kinds.items():
                if kind == "image":
                    found[name] = gradio.Image(
                        label="Picture", height=200, sources=["upload", "clipboard"], elem_id="picture"
                    )
                elif kind == "speech":
                    found[name] = gradio.Audio(label="Sound", sources=["upload", "microphone"], elem_id="sound")
    return found


def _players(gradio: Any) -> list[Any]:
    """Two in a row; those that have nothing to play are hidden."""
    found = []
    for start in range(1, MOST + 1, 2):
        with gradio.Row():
            for number in (start, start + 1):
                shared = {"visible": False, "format": "wav", "buttons": ["download"], "min_width": 200}
                found.append(gradio.Audio(label=f"Sound {number}", elem_id=f"sound_{number}", **shared))
    return found


def _choices(gradio: Any, session: _Session, target: str) -> dict[str, Any]:
    own = session.sampling(target)
    with gradio.Group():
        with gradio.Row():
            found = {
                "samples": gradio.Slider(1, MOST, value=4, step=1, label="Samples", info="how many", elem_id="samples"),
                "guidance": gradio.Slider(
                    0,
                    10,
                    value=own["guidance"],
                    step=0.5,
                    label="Guidance",
                    info="1 is none",
                    elem_id="guidance",
                ),
            }
        with gradio.Row():
            found["temperature"] = gradio.Slider(
                0,
                2,
                value=own["temperature"],
                step=0.05,
                label="Temperature",
                info="0 is the likeliest",
                elem_id="temperature",
            )
            found["top_k"] = gradio.Slider(
                0, 500, value=own["top_k"], step=5, label="Top-k", info="0 is all", elem_id="top_k"
            )
        with gradio.Row():
            found["seed"] = gradio.Number(
                value=0, precision=0, minimum=0, label="Seed", info="empty draws a new one", elem_id="seed"
            )
            if session.is_denoised:
                found["steps"] = gradio.Slider(
                    1, 200, value=50, step=1, label="Steps", info="of denoising", elem_id="steps"
                )
    return found


def _shown(
    *,
    pictures: list[np.ndarray] | None = None,
    text: str | None = None,
    whole: str | None = None,
    sounds: list[Generated] | None = None,
    note: str,
) -> list[Any]:
    """Values of the outputs; what has none is hidden."""
    gradio = _gradio()
    players = [
        gradio.update(
            visible=number < len(sounds or []),
            value=_sound(sounds[number]) if sounds and number < len(sounds) else None,
        )
        for number in range(MOST)
    ]
    return [
        gradio.update(visible=pictures is not None, value=pictures),
        gradio.update(visible=text is not None, value=text),
        gradio.update(visible=whole is not None, value=whole or ""),
        note,
        *players,
    ]


def _whole(documents: list[list[Generated]]) -> str:
    """Documents as cards, everything in order."""
    nothing = "<p>(the model ended the document at once)</p>"
    cards = ["".join(inline(made) for made in spans) or nothing for spans in documents]
    return "\n".join(f"<section>{card}</section>" for card in cards)


def _sound(made: Generated) -> tuple[int, np.ndarray]:
    return made.sample_rate or 1, (made.raw.clip(-1, 1) * 32_767).round().astype(np.int16)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            f"the demo page needs Gradio ({error}); install it with pip install 'omnimoe[demo]'"
        ) from None
    return gradio
