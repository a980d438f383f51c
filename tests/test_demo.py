"""The demo page in a real browser: it draws, writes, speaks and tells what is wrong, and fetches nothing."""

from __future__ import annotations

import io
import shutil
import wave

import numpy as np
import pytest
from PIL import Image

from omnimoe.generate import generate, interleave
from tests.narrow import PICTURE, TRANSFUSION, eager_model, narrow_model, narrow_tokenizers

gradio = pytest.importorskip("gradio", reason="the page needs the extra 'demo'")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")

from omnimoe.demo import SAMPLING, _Session, build_page, serve  # noqa: E402
from omnimoe.generation.sampling import set_sampling  # noqa: E402

TOKENIZERS = {name: held for name, held in narrow_tokenizers().items() if name != "latent"}
USUAL = {"tokenizers": TOKENIZERS, "seed": 0, "temperature": 0.9, "top_k": 100}
SLOW = 60_000
"""Milliseconds a busy machine may take for an answer."""


@pytest.fixture(scope="module")
def model():
    return eager_model()


@pytest.fixture(scope="module")
def address(model):
    page = build_page(model, name="a narrow model", tokenizers=TOKENIZERS)
    yield serve(page, in_background=True)
    page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        installed = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            opened = driver.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser to drive: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address):
    """A page of its own for each test; whatever it asks of another host is refused and fails the test."""
    elsewhere = []

    def route(asked):
        if asked.request.url.startswith((address, "data:", "blob:")):
            asked.continue_()
        else:
            elsewhere.append(asked.request.url)
            asked.abort()

    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(SLOW)
    opened.route("**/*", route)
    opened.goto(address)
    opened.wait_for_selector("#generate")
    yield opened
    opened.close()
    assert elsewhere == []


def choose(page, target: str, **numbers: float) -> None:
    page.locator("#target").get_by_label(target, exact=True).check()
    for name, value in numbers.items():
        field = page.locator(f"#{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")


def pictures(page, count: int) -> list[np.ndarray]:
    page.wait_for_function(f"document.querySelectorAll('#pictures img').length === {count}")
    sources = [image.get_attribute("src") for image in page.locator("#pictures img").all()]
    return [np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")) for source in sources]


def test_a_caption_is_drawn_as_generate_draws_it(page, model):
    page.fill("#words textarea", "a red apple")
    choose(page, "image", samples=2, guidance=3)
    page.click("#generate")
    wanted = generate(model, {"text": "a red apple"}, "image", num_samples=2, guidance=3.0, **USUAL)
    for found, made in zip(pictures(page, 2), wanted, strict=True):
        assert np.array_equal(found, made.raw)


@pytest.mark.slow
def test_a_picture_is_told_word_by_word(page, model, tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    page.click("#more button")
    page.locator("#picture input[type=file]").set_input_files(tmp_path / "a.png")
    page.wait_for_selector("#picture img")
    choose(page, "text", samples=1)
    page.click("#generate")
    (wanted,) = generate(model, {"image": PICTURE}, "text", **USUAL)
    page.wait_for_function(
        "wanted => document.querySelector('#text textarea')?.value === wanted", arg=wanted.raw.replace("\r", "\n")
    )


@pytest.mark.slow
def test_words_are_spoken(page, model):
    page.fill("#words textarea", "a lion")
    choose(page, "speech", samples=2)
    page.click("#generate")
    wanted = generate(model, {"text": "a lion"}, "speech", num_samples=2, **USUAL)
    for number, made in enumerate(wanted, 1):
        link = page.locator(f"#sound_{number} a[download]").first
        link.wait_for(state="attached")
        with wave.open(io.BytesIO(page.request.get(link.get_attribute("href")).body())) as file:
            assert (file.getframerate(), file.getnframes()) == (16_000, len(made.raw))
    assert not page.locator("#sound_3").is_visible()


@pytest.mark.slow
def test_a_document_is_shown_in_order(page, model):
    page.fill("#words textarea", "a lion")
    choose(page, "anything", samples=1)
    page.click("#generate")
    (wanted,) = interleave(model, {"text": "a lion"}, **USUAL)
    page.wait_for_selector("#page section")
    shown = page.evaluate("[...document.querySelectorAll('#page section > *')].map(part => part.tagName)")
    assert shown == [{"text": "P", "image": "IMG", "speech": "AUDIO"}[span.modality] for span in wanted]


@pytest.mark.slow
def test_a_mistake_is_told_on_the_page(page):
    page.fill("#words textarea", "apple " * 600)
    choose(page, "image", samples=1)
    page.click("#generate")
    page.get_by_text("the model was made for 512; shorten the input").first.wait_for()


def test_a_page_samples_as_the_model_was_saved_to_be_sampled():
    model = eager_model()
    set_sampling(model, {"image": {"guidance": 3.0, "top_k": 7}, "text": {"temperature": 0.5, "top_p": 0.8}})
    session = _Session(model, TOKENIZERS)
    assert session.sampling("image") == {"guidance": 3.0, "temperature": 1.0, "top_k": 7}
    assert session.sampling("text") == {"guidance": 1.0, "temperature": 0.5, "top_k": 0}
    assert session.sampling("speech") == SAMPLING
    rest = {"samples": 1, "seed": 0}
    for target, field, moved in (("image", 0, {"guidance": 1.0, "top_k": 0}), ("text", 1, {"temperature": 1.5})):
        for changes in ({}, moved):
            options = session.sampling(target) | rest | changes
            (*_, shown) = session.answers(target, [("text", "a lion")], options)
            asked = {**changes, **({"top_k": model.config.vocab_size} if "top_k" in changes else {})}
            (wanted,) = generate(model, {"text": "a lion"}, target, tokenizers=TOKENIZERS, seed=0, **asked)
            found = shown[field]["value"]
            assert np.array_equal(found[0], wanted.raw) if target == "image" else found == wanted.raw


def test_the_slider_of_steps_is_for_what_is_denoised_alone():
    session = _Session(narrow_model(TRANSFUSION), narrow_tokenizers())
    options = {"samples": 1, "seed": 0, "steps": 2, **SAMPLING}
    for target in ("image", "latent"):
        (*_, shown) = session.answers(target, [("text", "a lion")], options)
        assert len(shown[0]["value"]) == 1


@pytest.mark.slow
def test_sliders_follow_the_target(browser):
    model = eager_model()
    set_sampling(model, {"speech": {"guidance": 2.0, "temperature": 0.6, "top_k": 20}})
    built = build_page(model, tokenizers=TOKENIZERS)
    opened = browser.new_page()
    try:
        opened.goto(serve(built, in_background=True))
        opened.locator("#target").get_by_label("speech", exact=True).check()
        for name, value in (("guidance", "2"), ("temperature", "0.6"), ("top_k", "20")):
            opened.wait_for_function(
                f"wanted => document.querySelector('#{name} input[type=number]').value === wanted", arg=value
            )
    finally:
        opened.close()
        built.close()


def test_a_taken_port_is_refused(address, model):
    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 cannot be used"):
        serve(build_page(model, tokenizers=TOKENIZERS), port=port)
