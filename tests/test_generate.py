"""Generation in every direction, with the real vocabularies and a model of one narrow layer."""

from __future__ import annotations

import argparse
import json
import sys
import wave

import numpy as np
import pytest
import torch
from PIL import Image

from omnimoe.commands import generate as command
from omnimoe.data.documents import lay_out
from omnimoe.generate import Generated, GenerationError, generate, interleave, read_wave
from omnimoe.hub import load
from omnimoe.layers import Attention, Rope
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.tokenizers import TokenizerError, load_tokenizer
from omnimoe.tokenizers.picture import PictureTokenizer
from omnimoe.tokenizers.speech import SpeechTokenizer
from omnimoe.tokenizers.text import BEGIN_IMAGE_ID, BEGIN_SPEECH_ID, BOS_ID, END_IMAGE_ID, EOS_ID
from tests.declarations import DECLARATIONS, DENSE, build

# the module; `omnimoe.generate` is the function
generation = sys.modules["omnimoe.generate"]

NANO = load("mot_nano", device="meta").config
CONFIG = NANO.replace(
    hidden_size=32, num_layers=1, attention=NANO.attention.replace(num_heads=2), max_position_embeddings=512
)
RANGES = CONFIG.token_ranges


@pytest.fixture(scope="module")
def tokenizers():
    """The real text tokenizer, and untrained narrow networks with the real numbers of codes."""
    torch.manual_seed(0)
    small = {"hidden_size": 20, "encoder_blocks": 1, "decoder_blocks": 1}
    return {
        "text": load_tokenizer("text"),
        "image": PictureTokenizer(PictureTokenizer.Config(**small)),
        "speech": SpeechTokenizer(SpeechTokenizer.Config(**small, frame_blocks=1)),
    }


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return OmniMoeForCausalLM(CONFIG).eval()


@pytest.fixture
def shipped(tokenizers, monkeypatch):
    """Puts the narrow tokenizers in the place of those that ship."""
    by_name = {"text": "text", "picture": "image", "speech": "speech"}
    monkeypatch.setattr(generation, "load_tokenizer", lambda name: tokenizers[by_name[name]])


PICTURE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
SOUND = (0.5 * np.sin(np.arange(8_000) * 0.05)).astype(np.float32)
RAW = {"text": "a red apple", "image": PICTURE, "speech": SOUND}


@pytest.mark.parametrize(
    ("source", "to"), [(source, to) for source in RAW for to in RAW if source != to] + [("text", "text")]
)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_every_direction(model, tokenizers, source, to, temperature):
    (made,) = generate(
        model, {source: RAW[source]}, to, tokenizers=tokenizers, seed=0, temperature=temperature, max_new_tokens=64
    )
    assert made.modality == to
    assert 1 <= len(made.ids) <= 64
    if to == "text":
        assert isinstance(made.raw, str)
    elif to == "image":
        assert len(made.ids) == 64
        assert made.raw.shape == (64, 64, 3)
        assert made.raw.dtype == np.uint8
    else:
        assert made.raw.shape == (640 * len(made.ids),)
        assert made.raw.dtype == np.float32
        assert made.sample_rate == 16_000
    decoded = tokenizers[to].decode(made.ids)
    assert decoded == made.raw if to == "text" else np.array_equal(decoded, made.raw)


@pytest.mark.parametrize(
    ("document", "to", "wanted"),
    [
        ({"text": "a red apple"}, "image", [BOS_ID, "text", BEGIN_IMAGE_ID]),
        ({"text": "a red apple"}, "speech", [BOS_ID, "text", BEGIN_SPEECH_ID]),
        ({"image": PICTURE}, "text", [BOS_ID, BEGIN_IMAGE_ID, "image", END_IMAGE_ID]),
        ([("image", PICTURE), ("text", "an")], "text", [BOS_ID, BEGIN_IMAGE_ID, "image", END_IMAGE_ID, "text"]),
        ([], "image", [BOS_ID, BEGIN_IMAGE_ID]),
    ],
)
def test_prompts_are_the_starts_of_documents(model, tokenizers, monkeypatch, document, to, wanted):
    seen = {}

    def record(ids, **options):
        seen["ids"] = ids
        return torch.cat((ids, torch.full((len(ids), 1), RANGES[to].start + 20)), 1)

    monkeypatch.setattr(model, "generate", record)
    monkeypatch.setattr(generation, "_decoded", lambda name, ids, tokenizer: ids)
    generate(model, document, to, tokenizers=tokenizers)
    parts = dict(document)
    if "text" in parts and "image" in parts:
        parts["text"] = "an"
    expected = []
    for part in wanted:
        if isinstance(part, int):
            expected.append(part)
        else:
            expected += (tokenizers[part].encode(parts[part]) + RANGES[part].start).tolist()
    assert seen["ids"].tolist() == [expected]


def test_a_prompt_is_what_training_documents_start_with(tokenizers):
    text, image = tokenizers["text"].encode("a red apple").numpy(), tokenizers["image"].encode(PICTURE).numpy()
    whole = lay_out([("text", text), ("image", image)], RANGES, bos_id=BOS_ID, eos_id=EOS_ID).ids
    prompt = lay_out([("text", text)], RANGES, bos_id=BOS_ID, opened="image").ids
    assert whole[: len(prompt)].tolist() == prompt.tolist()
    assert whole[-1] == EOS_ID


def test_a_batch_of_prompts_of_different_lengths(model, tokenizers):
    documents = [{"text": "a"}, [("text", "a very long red apple on a table"), ("speech", SOUND)], []]
    options = {"tokenizers": tokenizers, "temperature": 0}
    together = generate(model, documents, "image", **options)
    for document, made in zip(documents, together, strict=True):
        (alone,) = generate(model, document, "image", **options)
        assert torch.equal(alone.ids, made.ids)


def test_samples_come_document_by_document(model, tokenizers):
    made = generate(
        model, [{"text": "a"}, {"text": "b"}], "text", tokenizers=tokenizers, seed=0, num_samples=3, max_new_tokens=8
    )
    assert len(made) == 6
    assert len({tuple(found.ids.tolist()) for found in made}) == 6


def test_a_seed_repeats_and_leaves_the_global_generator_alone(model, tokenizers):
    state = torch.get_rng_state()
    options = {"tokenizers": tokenizers, "max_new_tokens": 12, "num_samples": 2, "top_k": 500, "top_p": 0.99}
    runs = [generate(model, {"text": "a"}, "speech", seed=seed, **options) for seed in (5, 5, 6)]
    first, second, other = ([made.ids.tolist() for made in run] for run in runs)
    assert first == second
    assert first != other
    assert torch.equal(state, torch.get_rng_state())
    unseeded = [generate(model, {"text": "a"}, "speech", **options)[0].ids.tolist() for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_text_ends_where_another_span_would_begin(model, tokenizers, monkeypatch):
    def scripted(ids, **options):
        assert {EOS_ID, BEGIN_IMAGE_ID, BEGIN_SPEECH_ID} == set(options["eos_token_id"])
        return torch.cat((ids, torch.tensor([[50, 60, BEGIN_IMAGE_ID, 2050]])), 1)

    monkeypatch.setattr(model, "generate", scripted)
    (made,) = generate(model, {"image": PICTURE}, "text", tokenizers=tokenizers)
    assert made.ids.tolist() == [50, 60]


def test_interleaved_continuations(model, tokenizers):
    continued = interleave(
        model, [{"text": "a"}, {"image": PICTURE}], tokenizers=tokenizers, seed=1, max_new_tokens=150, num_samples=2
    )
    assert len(continued) == 4
    for spans in continued:
        assert all(len(made.ids) == 64 for made in spans if made.modality == "image")
    only = interleave(model, {"text": "a"}, tokenizers=tokenizers, spans=(), seed=1, max_new_tokens=30)
    assert {made.modality for made in only[0]} <= {"text"}


@pytest.mark.parametrize("name", ["moma", "expert_choice", "one_way", "moe", "static"])
def test_every_kind_of_model_generates(name, tokenizers):
    config = DECLARATIONS[name].replace(modalities=CONFIG.modalities)
    (made,) = generate(build(config), {"text": "a"}, "image", tokenizers=tokenizers, seed=0)
    assert len(made.ids) == 64


@pytest.mark.parametrize(
    ("document", "to", "options", "message"),
    [
        ({"text": "a"}, "video", {}, "no modality 'video'; it has text, image, speech"),
        ({"video": "a"}, "image", {}, "no discrete modality 'video'"),
        ({"text": ""}, "image", {}, "the text input '' is empty; leave it out"),
        ({"image": "nowhere.png"}, "text", {}, "no picture at nowhere.png"),
        ({"image": 3}, "text", {}, "a picture is a path"),
        ({"speech": np.zeros(0, np.float32)}, "text", {}, "at least one sample"),
        (["text"], "image", {}, "a document is a list of"),
        ({"text": "a"}, "image", {"max_new_tokens": 10}, "64 tokens, so max_new_tokens cannot be 10"),
        ({"text": "a"}, "text", {"max_new_tokens": -1}, "max_new_tokens at least 1"),
        ({"text": "a"}, "image", {"temperature": -1}, "temperature must be 0 or more"),
        ({"text": "a"}, "image", {"temperature": 0, "num_samples": 2}, "one answer, not 2"),
        ({"text": "a"}, "image", {"num_samples": 0}, "num_samples"),
        ({"text": "a"}, "image", {"top_k": 0}, "top_k must be at least 1"),
        ({"text": "a"}, "image", {"top_p": 1.5}, "top_p in"),
    ],
)
def test_what_does_not_fit_is_refused(model, tokenizers, document, to, options, message):
    with pytest.raises((GenerationError, TokenizerError), match=message):
        generate(model, document, to, tokenizers=tokenizers, **options)


@pytest.mark.parametrize(
    ("config", "to", "message"),
    [
        (DENSE, "image", "has 1000 ids and spans of 64 tokens, the model 12 and 4"),
        (CONFIG.replace(mask="bidirectional"), "image", "only causal models"),
        (CONFIG.replace(mask="block_causal", bidirectional_modalities=("image",)), "image", "both directions"),
        (DECLARATIONS["transfusion"], "latent", "call denoise"),
        (
            CONFIG.replace(attention=Attention.Config(num_heads=2, rope=Rope.Config(sections=(4, 2, 2)))),
            "text",
            "3 axes",
        ),
    ],
)
def test_models_that_cannot_are_told(config, to, message, tokenizers):
    with pytest.raises(GenerationError, match=message):
        generate(OmniMoeForCausalLM(config), [], to, tokenizers=tokenizers)


def write_wave(path, samples: np.ndarray, rate: int, width: int = 2, channels: int = 1) -> str:
    scale = 2 ** (8 * width - 1) - 1
    whole = (samples * scale).round().astype(np.int64) + (128 if width == 1 else 0)
    data = np.repeat(whole, channels).astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return str(path)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wave_files_are_read(tmp_path, width, channels):
    waveform, rate = read_wave(write_wave(tmp_path / "a.wav", SOUND, 22_050, width, channels))
    assert rate == 22_050
    assert waveform.dtype == np.float32
    np.testing.assert_allclose(waveform, SOUND, atol=1.5 / 2 ** (8 * width - 1))


def test_a_sound_of_another_rate_is_resampled(model, tokenizers, tmp_path, monkeypatch):
    path = write_wave(tmp_path / "a.wav", SOUND, 8_000)
    lengths = []
    encode = tokenizers["speech"].encode
    monkeypatch.setattr(tokenizers["speech"], "encode", lambda *raw: lengths.append(len(encode(*raw))) or encode(*raw))
    generate(model, {"speech": read_wave(path)}, "text", tokenizers=tokenizers, max_new_tokens=2)
    assert lengths == [25]  # a second at 8 kHz, in units of 40 ms


def test_outputs_are_written(tmp_path):
    picture = Generated(modality="image", ids=torch.zeros(64), raw=np.full((64, 64, 3), 7, np.uint8))
    assert np.array_equal(np.asarray(Image.open(picture.save(tmp_path / "a.png"))), picture.raw)
    sound = Generated(modality="speech", ids=torch.zeros(1), raw=SOUND, sample_rate=16_000)
    waveform, rate = read_wave(sound.save(tmp_path / "a.wav"))
    assert rate == 16_000
    np.testing.assert_allclose(waveform, SOUND, atol=1e-4)
    text = Generated(modality="text", ids=torch.zeros(1), raw="ein Äpfelchen")
    assert text.save(tmp_path / "a.txt").read_text(encoding="utf-8") == "ein Äpfelchen\n"
    with pytest.raises(GenerationError, match=r"written as \.wav"):
        sound.save(tmp_path / "a.mp3")
    with pytest.raises(GenerationError, match=r"written as \.png"):
        picture.save(tmp_path / "a.wav")


def test_what_ships_fits_the_zoo():
    found = generation._load(NANO, None, {"text", "image", "speech"})
    assert {name: tokenizer.num_tokens for name, tokenizer in found.items()} == {
        "text": None,
        "image": 64,
        "speech": None,
    }


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return str(path)


def call(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(part) for part in arguments]))


@pytest.mark.usefixtures("shipped")
def test_the_command_draws_numbered_pictures(folder, tmp_path, capsys):
    out = tmp_path / "new" / "x.png"
    common = (
        "--model",
        folder,
        "--from",
        "text",
        "a red apple",
        "--to",
        "image",
        "--num",
        "2",
        "--seed",
        "0",
        "--json",
    )
    assert call(*common, "--out", out) == 0
    told = json.loads(capsys.readouterr().out)
    files = [tmp_path / "new" / name for name in ("x_1.png", "x_2.png")]
    assert [sample["file"] for sample in told["samples"]] == [str(file) for file in files]
    assert [sample["num_tokens"] for sample in told["samples"]] == [64, 64]
    pictures = [Image.open(file).convert("RGB") for file in files]
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    again = tmp_path / "again.png"
    assert call(*common, "--out", again) == 0
    repeated = [(tmp_path / f"again_{i}.png").read_bytes() for i in (1, 2)]
    assert repeated == [file.read_bytes() for file in files]


@pytest.mark.usefixtures("shipped")
def test_the_command_reads_pictures_and_sounds(folder, tmp_path, capsys):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    write_wave(tmp_path / "a.wav", SOUND, 8_000)
    given = ("--from", "image", tmp_path / "a.png", "--from", "speech", tmp_path / "a.wav")
    assert call("--model", folder, *given, "--to", "text", "--max-new-tokens", "5", "--seed", "1") == 0
    printed = capsys.readouterr().out
    out = tmp_path / "b.wav"
    assert call("--model", folder, *given, "--to", "speech", "--out", out, "--max-new-tokens", "5") == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert len(read_wave(out)[0]) % 640 == 0
    out = tmp_path / "b.txt"
    assert call("--model", folder, *given, "--to", "text", "--max-new-tokens", "5", "--seed", "1", "--out", out) == 0
    assert out.read_text(encoding="utf-8") == printed


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--out": None}, "needs a file to write: --out image.png"),
        ({"--out": "x.wav"}, "must end in .png"),
        ({"--out": "."}, "must end in .png"),
        ({"--num": "0"}, "--num must be at least 1"),
        ({"--to": "video"}, "no modality 'video'"),
        ({"--model": "nowhere"}, "neither an existing folder nor an id"),
        ({"--model": "mot_nanoo"}, "mot_nano"),
        ({"--model": "mot_7b"}, "no weights for 'mot_7b'; train it first"),
        ({"--from": ("image", "nowhere.png")}, "no picture at nowhere.png"),
        ({"--from": ("speech", "nowhere.wav")}, "no sound at nowhere.wav"),
        ({"--from": ("speech", __file__)}, "is not a PCM WAV file"),
        ({"--from": ("image", __file__)}, "is not a picture"),
        ({"--from": ("text", "")}, "is empty"),
        ({"--from": ("smell", "roses")}, "no discrete modality 'smell'"),
    ],
)
def test_a_wrong_call_is_one_clear_error(folder, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    usual = {"--model": folder, "--from": ("text", "a"), "--to": "image", "--out": "x.png"}
    arguments = []
    for option, value in {**usual, **changes}.items():
        if value is not None:
            arguments += [option, *(value if isinstance(value, tuple) else (value,))]
    with pytest.raises(ValueError, match=message) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


def test_a_prompt_longer_than_the_model_was_made_for_is_refused(model, tokenizers):
    long = {"text": "apple " * 600}
    message = r"the prompt has \d{3,} tokens, and the model was made for 512; shorten the input"
    with pytest.raises(GenerationError, match=message):
        generate(model, long, "image", tokenizers=tokenizers)
    with pytest.raises(GenerationError, match=message):
        interleave(model, long, tokenizers=tokenizers)
