"""The pipeline beside diffusers' own, over one published folder: pictures, clips, sound and answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import omnimoe
from omnimoe.cli import main
from omnimoe.convert import to_published
from omnimoe.pipelines import find_pipeline
from omnimoe.pipelines.cosmos3 import Cosmos3
from omnimoe.zoo.cosmos3.layout import Scene
from tests.hub.conftest import hub  # noqa: F401 - a fixture
from tests.zoo.cosmos3.test_parity import said
from tests.zoo.cosmos3.tiny import KINDS, Sample, generator, make_model, reasoner

diffusers = pytest.importorskip("diffusers", reason="pip install 'omnimoe[diffusers]'")

TEMPLATE = (
    "{% for turn in messages %}<|im_start|> {{ turn.role }} {% if turn.content is string %}{{ turn.content }}"
    "{% else %}{% for part in turn.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    " <|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
WORDS = "system user assistant a red kite over the sand blurry video image is not of resolution long and seconds"


def make_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, with the special ids of the tiny model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<|im_end|>": 2, "<unk>": 3, "<|im_start|>": 1, "<|image_pad|>": 100}
    special |= {"<|vision_start|>": 102, "<|vision_end|>": 103}
    vocab = {word: 5 + place for place, word in enumerate(WORDS.split())} | special
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    held = PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=[word for word in special if word not in ("<unk>", "<|im_end|>")],
        chat_template=TEMPLATE,
    )
    held.save_pretrained(folder)


def make_vae() -> Any:
    torch.manual_seed(5)
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=3,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        latents_mean=[0.1, -0.2, 0.3],
        latents_std=[0.8, 1.2, 0.9],
    ).eval()


def make_sounds() -> Any:
    torch.manual_seed(6)
    return diffusers.Cosmos3AVAEAudioTokenizer(
        sampling_rate=96,
        vocoder_input_dim=6,
        dec_dim=4,
        dec_c_mults=(1, 2),
        dec_strides=(2, 2),
        enc_dim=4,
        enc_latent_dim=12,
        enc_c_mults=(1,),
        enc_strides=(2,),
        enc_num_blocks=1,
    ).eval()


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("published") / "cosmos3"
    to_published(make_model(kind), made)
    make_tokenizer(made / "text_tokenizer")
    make_vae().save_pretrained(made / "vae")
    if kind == "cosmos3_omni":
        make_sounds().save_pretrained(made / "sound_tokenizer")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    )
    scheduler.save_pretrained(made / "scheduler")
    is_edge = kind == "cosmos3_edge"
    index = {"default_use_system_prompt": not is_edge, "use_native_flow_schedule": is_edge}
    (made / "model_index.json").write_text(json.dumps(index))
    return made


@pytest.fixture(scope="module")
def pipeline(folder) -> Cosmos3:
    found = find_pipeline(folder)
    assert found is not None
    assert found[0] is Cosmos3
    return Cosmos3.from_pretrained(folder)


@pytest.fixture(scope="module")
def peer(kind, folder) -> Any:
    from transformers import AutoTokenizer

    made = diffusers.Cosmos3OmniPipeline(
        transformer=generator(kind, folder),
        text_tokenizer=AutoTokenizer.from_pretrained(folder / "text_tokenizer"),
        vae=diffusers.AutoencoderKLWan.from_pretrained(folder / "vae"),
        scheduler=diffusers.UniPCMultistepScheduler.from_pretrained(folder / "scheduler"),
        sound_tokenizer=make_sounds() if kind == "cosmos3_omni" else None,
        enable_safety_checker=False,
        **json.loads((folder / "model_index.json").read_text()),
    )
    made.set_progress_bar_config(disable=True)
    return made


def asked(peer: Any, words: str, seed: int, **given: Any) -> Any:
    """Frames ``(T, H, W, 3)`` in [0, 1] of diffusers' pipeline, and its sound."""
    out = peer(
        words,
        negative_prompt="blurry",
        num_inference_steps=3,
        output_type="np",
        generator=torch.Generator().manual_seed(seed),
        **given,
    )
    return out.video, out.sound


OPTIONS = {"steps": 3, "against": "blurry", "seed": 7}


def same(frames: np.ndarray, wanted: np.ndarray) -> None:
    assert frames.shape == wanted.shape
    assert np.abs(frames / 255 - wanted).max() < 1 / 255 + 1e-6


def test_pictures_of_words(pipeline, peer):
    """Two at once, of an odd number of latent cells, as diffusers draws them one by one."""
    words = ["a red kite", "a red kite over the sand"]
    drawn = pipeline.draw(words, sizes=(48, 64), guidance=3.0, **OPTIONS)
    for place, text in enumerate(words):
        wanted, _ = asked(peer, text, 7 + place, num_frames=1, height=48, width=64, guidance_scale=3.0)
        same(drawn[place][None], wanted)


def test_a_clip_that_begins_with_a_picture(pipeline, peer):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    given = {"num_frames": 9, "fps": 16.0}
    (clip,) = pipeline.film([[picture, "a red kite"]], sizes=(32, 48), guidance=2.0, **given, **OPTIONS)
    wanted, _ = asked(peer, "a red kite", 7, image=picture, height=32, width=48, guidance_scale=2.0, **given)
    same(clip.frames, wanted)
    assert clip.fps == 16.0


def test_a_clip_with_sound(kind, pipeline, peer):
    if kind == "cosmos3_edge":
        with pytest.raises(ValueError, match="this copy makes no sound"):
            pipeline.film(["a kite"], num_frames=5, sound=True)
        return
    given = {"num_frames": 5, "fps": 24.0}
    (clip,) = pipeline.film(["a red kite"], sizes=(32, 32), guidance=1.0, sound=True, **given, **OPTIONS)
    wanted, sound = asked(peer, "a red kite", 7, height=32, width=32, guidance_scale=1.0, enable_sound=True, **given)
    same(clip.frames, wanted)
    assert clip.sample_rate == 96
    torch.testing.assert_close(clip.sound, sound.detach(), atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_answers_about_pictures(kind, pipeline, folder):
    pictures = [np.random.default_rng(place).integers(0, 255, (16, 24, 3), dtype=np.uint8) for place in range(2)]
    encoder = pipeline.model.model.modalities["vision"].get_encoder()
    small = {"size": {"shortest_edge": 64, "longest_edge": 4096}}
    prepare = encoder.prepare
    encoder.prepare = lambda raws: prepare(raws, **small)
    try:
        documents = [[pictures[0], "is the kite red"], "a kite is", [pictures[1], "and", pictures[0], "is"]]
        found = pipeline.answer(documents, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        reader = reasoner(kind, folder)
        for document, answer in zip(documents, found, strict=True):
            parts = [document] if isinstance(document, str) else document
            given = [prepare([part], **small) for part in parts if not isinstance(part, str)]
            held = [(one["patches"][0], one["grids"][0]) for one in given]
            content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts]
            counts = iter(int(grid.prod()) // 4 for _, grid in held)
            ids = pipeline._talk([{"role": "user", "content": content if held else document}])
            ids = [token for one in ids for token in [one] * (next(counts) if one == 100 else 1)]
            start = len(ids)
            barred = [2, 100, 101, 102, 117, 118, 119, *range(len(pipeline.tokenizer), 120)]
            for _ in range(4):
                logits = said(reader, Sample(Scene(ids=ids), held))[-1]
                logits[barred] = -torch.inf
                ids.append(int(logits.argmax()))
            assert answer == pipeline.tokenizer.decode(ids[start:])
    finally:
        encoder.prepare = prepare


def test_from_the_command_line(pipeline, folder, tmp_path, capsys):
    given = ["generate", "--model", str(folder), "--from", "text", "a red kite", "--size", "32x48", "--steps", "2"]
    given += ["--seed", "3", "--device", "cpu"]
    assert main([*given, "--to", "image", "--out", str(tmp_path / "kite.png")]) == 0
    (drawn,) = pipeline.draw(["a red kite"], sizes=(32, 48), steps=2, seed=3)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "kite.png")), drawn)
    assert main([*given, "--to", "video", "--frames", "5", "--out", str(tmp_path / "kite.webp")]) == 0
    assert Image.open(tmp_path / "kite.webp").n_frames == 5
    assert main([*given, "--to", "image", "--frames", "5", "--out", str(tmp_path / "kite.png")]) != 0
    assert "--frames is for --to video" in capsys.readouterr().err


def test_by_an_id_on_the_hub(folder, pipeline, hub, tmp_path):  # noqa: F811
    """The files of the folders below are fetched, and only those that are read."""
    place = tmp_path / "published"
    shutil.copytree(folder, place)
    to_published(pipeline.model, tmp_path / "many", max_shard_size="80KB")
    shutil.rmtree(place / "transformer")
    shutil.copytree(tmp_path / "many" / "transformer", place / "transformer")
    (place / "vae" / "old.bin").write_bytes(b"a pickle")
    (place / "assets").mkdir()
    (place / "assets" / "film.json").write_text("{}")
    hub.add("nvidia/tiny", place)
    assert omnimoe.load("nvidia/tiny", device="meta").config.published["family"] == "cosmos3"
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")], "a config alone needs no weights"
    model = omnimoe.from_pretrained("nvidia/tiny")
    held = pipeline.model.state_dict()
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())
    again = Cosmos3.from_pretrained("nvidia/tiny")
    options = {"sizes": (32, 32), "steps": 1, "seed": 0}
    assert np.array_equal(again.draw(["a kite"], **options)[0], pipeline.draw(["a kite"], **options)[0])
    assert not {"vae/old.bin", "assets/film.json"} & set(hub.fetched())
    omnimoe.convert_checkpoint("hf-hub:nvidia/tiny", tmp_path / "ours")
    assert omnimoe.from_pretrained(tmp_path / "ours").config.published["family"] == "cosmos3"


def test_a_copy_without_what_draws_only_answers(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "mute", ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(ValueError, match="no autoencoder to draw with"):
        Cosmos3.from_pretrained(tmp_path / "mute").draw(["a kite"])
    shutil.rmtree(tmp_path / "mute" / "text_tokenizer")
    with pytest.raises(omnimoe.CheckpointError, match="has no text_tokenizer/"):
        Cosmos3.from_pretrained(tmp_path / "mute")


@pytest.mark.parametrize(
    ("documents", "options", "said"),
    [
        (["a kite"], {"sizes": (40, 48)}, "multiples of 16"),
        (["a kite"], {"num_frames": 0}, "num_frames must be at least 1"),
        (["a kite"], {"num_frames": 5.0}, "num_frames must be a whole number, got 5.0"),
        (["a kite"], {"fps": "24"}, "fps must be a number above 0, got '24'"),
        (["a kite"], {"steps": 0}, "steps must be at least 1, got 0"),
        (["a kite"], {"seed": 0.5}, "seed must be a whole number, got 0.5"),
        (["a kite"], {"guidance": "6"}, "guidance must be a number"),
        ([["a kite", np.zeros((16, 16, 3), np.uint8)]], {"num_frames": 5}, "document 0 cannot be drawn"),
        ([[np.zeros((16, 16, 3), np.uint8), "a kite"]], {"num_frames": 1}, "document 0 cannot be drawn"),
        ("a kite", {}, "put it into a list"),
    ],
)
def test_what_cannot_be_drawn_is_refused(pipeline, documents, options, said):
    with pytest.raises(ValueError, match=said):
        pipeline.film(documents, **options)
