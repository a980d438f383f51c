"""A whole pi0 folder at a tiny size, from pictures, words and states to actions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Model
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split

from omnimoe import CheckpointError, convert_checkpoint
from omnimoe.convert.folders import check_destination
from omnimoe.pipelines import find_pipeline
from omnimoe.pipelines.pi0 import Pi0, Scale, on_square, read_scales, training_times
from omnimoe.tokenizers.hf_text import HfTextTokenizer
from omnimoe.zoo.pi0.convert import ACTION, OWN_NORMALIZER, PI0, SEEN, STATE, unread
from tests.zoo.pi0.peer import TINY, equal_weights, make_peer, published, save_published

PLAIN = published(**TINY)
WORDS = {word: place for place, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "\n", " ", "pick", "up", "cup"])}
NORMALIZER = "policy_preprocessor_step_5_normalizer_processor.safetensors"


def words() -> HfTextTokenizer:
    model = Model(WordLevel(WORDS, unk_token="<unk>"))
    model.pre_tokenizer = Sequence([Split(" ", "isolated"), Split("\n", "isolated")])
    return HfTextTokenizer(HfTextTokenizer.Config(add_markers=False), model=model)


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    return make_peer(PLAIN)


@pytest.fixture(scope="module")
def pi0(peer) -> Pi0:
    return Pi0(equal_weights(peer, PLAIN), words())


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
    made = tmp_path_factory.mktemp("published") / "pi0"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(PLAIN))
    save_published(peer, made / "model.safetensors")
    words().model.save(str(made / "tokenizer.json"))
    numbers = {"mean": torch.tensor([1.0, 2.0, 3.0]), "std": torch.tensor([0.5, 1.0, 2.0])}
    held = {f"{key}.{name}": rows.clone() for key in ("observation.state", "action") for name, rows in numbers.items()}
    save_file(held, made / NORMALIZER)
    return made


def picture(seed: int, tall: int = 28, wide: int = 28) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (tall, wide, 3), dtype=np.uint8)


def test_actions_are_those_of_the_reference(pi0, peer):
    """Samples of several cameras and words of several lengths in one call, without a padding in the reference."""
    pictures = [[picture(0), picture(1)], [picture(2)]]
    states = np.random.default_rng(3).normal(size=(2, 4))
    noise = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    found = pi0.act(pictures, ["pick up cup", "cup"], states, noise=noise)
    assert found.shape == (2, 5, 7)
    for row, cameras in enumerate(pictures):
        ids = [PLAIN["vlm_config"]["image_token_index"]] * (4 * len(cameras))
        ids += [2, *pi0.tokenizer.encode(("pick up cup\n", "cup\n")[row]).tolist()]
        pixels = torch.stack([torch.from_numpy(seen).permute(2, 0, 1) / 255 * 2 - 1 for seen in cameras])
        wanted = peer.sample_actions(
            state=torch.cat((torch.tensor(states[row], dtype=torch.float32), torch.zeros(2)))[None],
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            pixel_values=pixels[None],
            pixel_attention_mask=torch.ones(1, len(cameras), dtype=torch.bool),
            noise=noise[row : row + 1],
        )
        assert float((found[row] - wanted[0]).norm() / wanted.norm()) < 1e-5


def test_a_sample_has_its_noise_whatever_it_is_drawn_with(pi0):
    both = pi0.act([[picture(0)], [picture(1)]], ["cup", "pick up cup"], np.ones((2, 6)), seed=3, steps=2)
    second = pi0.act([[picture(1)]], ["pick up cup"], np.ones((1, 6)), seed=4, steps=2)
    torch.testing.assert_close(both[1:], second, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both[0], both[1])


def test_a_sample_without_a_camera_among_others(pi0):
    pictures, words, states = [[], [picture(1)]], ["cup", "pick up cup"], np.ones((2, 6))
    both = pi0.act(pictures, words, states, seed=0, steps=2)
    for row in range(2):
        alone = pi0.act(pictures[row : row + 1], words[row : row + 1], states[:1], seed=row, steps=2)
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_a_layout_is_pictures_words_state_and_actions(pi0):
    batch = pi0.batch([[picture(0)]], ["pick_up\ncup "], torch.ones(1, 6))
    said = pi0.tokenizer.encode("pick up cup\n").tolist()
    assert batch["input_ids"].tolist() == [[SEEN] * 4 + [2, *said, STATE] + [ACTION] * 5]
    assert batch["attention_mask"].all()


def test_a_folder_with_the_scales_of_a_robot(folder, pi0, tmp_path):
    assert find_pipeline(folder) == (Pi0, str(folder))
    loaded = Pi0.from_pretrained(folder)
    states, noise = torch.tensor([[1.5, 2.0, 5.0]]), torch.randn(1, 5, 7)
    found = loaded.act([[picture(0)]], ["cup"], states, noise=noise)
    plain = pi0.act([[picture(0)]], ["cup"], torch.tensor([[1.0, 0.0, 1.0]]), noise=noise)
    torch.testing.assert_close(found, plain[..., :3] * loaded.action.std + loaded.action.mean, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"states must be \(B, 3\)"):
        loaded.act([[picture(0)]], ["cup"], torch.ones(1, 6))
    convert_checkpoint(folder, tmp_path / "ours")
    again = Pi0.from_pretrained(tmp_path / "ours", tokenizer=words())
    assert torch.equal(again.act([[picture(0)]], ["cup"], states, noise=noise), found)


def test_scales_of_the_processor_of_transformers(tmp_path):
    assert read_scales(tmp_path) == {}
    plain = {"state_mean": [0.0, 1.0], "state_std": [1.0, 2.0], "actions_mean": None, "actions_std": None}
    (tmp_path / "processor_config.json").write_text(json.dumps(plain))
    (scale,) = read_scales(tmp_path).values()
    torch.testing.assert_close(scale.into(torch.tensor([[1.0, 5.0]])), torch.tensor([[1.0, 2.0]]))
    (tmp_path / "processor_config.json").write_text(json.dumps({**plain, "state_std": [1.0]}))
    with pytest.raises(CheckpointError, match="scales of states and actions"):
        read_scales(tmp_path)


STATISTICS = {
    "normalize_inputs.buffer_observation_state.mean": torch.tensor([1.0, 2.0, 3.0]),
    "normalize_inputs.buffer_observation_state.std": torch.tensor([0.5, 1.0, 2.0]),
    "normalize_targets.buffer_action.mean": torch.full((2,), torch.inf),
    "normalize_targets.buffer_action.std": torch.full((2,), torch.inf),
    "unnormalize_outputs.buffer_action.mean": torch.tensor([4.0, 5.0]),
    "unnormalize_outputs.buffer_action.std": torch.tensor([2.0, 3.0]),
}
"""As earlier files of lerobot hold them among their weights; what no data set gave is infinite."""


def test_scales_among_the_weights(peer, tmp_path, caplog):
    published_folder = tmp_path / "published"
    published_folder.mkdir()
    (published_folder / "config.json").write_text(json.dumps(PLAIN))
    save_published(peer, published_folder / "model.safetensors")
    save_file(load_file(published_folder / "model.safetensors") | STATISTICS, published_folder / "model.safetensors")
    convert_checkpoint(published_folder, tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="published")
    for folder in (published_folder, tmp_path / "ours", tmp_path / "back"):
        loaded = Pi0.from_pretrained(folder, tokenizer=words())
        assert loaded.state.mean.tolist() == [1, 2, 3]
        assert loaded.state.std.tolist() == [0.5, 1, 2]
        assert (loaded.action.mean.tolist(), loaded.action.std.tolist()) == ([4, 5], [2, 3])
    theirs, back = (load_file(place / "model.safetensors") for place in (published_folder, tmp_path / "back"))
    assert all(
        torch.equal(back[name], held) for name, held in theirs.items() if name not in unread(loaded.model.config)
    )
    assert not (tmp_path / "back" / OWN_NORMALIZER).exists()
    assert "beside the model" not in caplog.text
    convert_checkpoint(loaded.model, tmp_path / "alone", to="published")
    assert "without 6 tensors that its file held beside the model, normalize_inputs.buffer_ob" in caplog.text


def test_scales_that_no_data_set_gave(tmp_path):
    save_file({name: torch.full_like(held, torch.inf) for name, held in STATISTICS.items()}, tmp_path / OWN_NORMALIZER)
    assert read_scales(tmp_path) == {}


def test_a_normalizer_of_another_step_goes_along(folder, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (theirs / name).write_bytes((folder / name).read_bytes())
    (theirs / NORMALIZER.replace("_5_", "_3_")).write_bytes((folder / NORMALIZER).read_bytes())
    convert_checkpoint(theirs, tmp_path / "ours")
    assert read_scales(tmp_path / "ours")["action"].mean.tolist() == [1, 2, 3]
    with pytest.raises(CheckpointError, match=r"policy_preprocessor_step_3\S* already"):
        check_destination(theirs_alone(tmp_path), PI0, overwrite=False)


def theirs_alone(place: Path) -> Path:
    """A folder that holds a normalizer and nothing else."""
    (place / "alone").mkdir()
    (place / "alone" / NORMALIZER.replace("_5_", "_3_")).write_bytes(b"of somebody")
    return place / "alone"


def normalised(state: str, action: str, where: str, folder: Path) -> None:
    """Writes how numbers are normalised into one of the places where lerobot says it."""
    plain = {"VISUAL": "IDENTITY", "STATE": state, "ACTION": action}
    if where == "preprocessor":
        step = {"registry_name": "normalizer_processor", "config": {"eps": 1e-8, "norm_map": plain}}
        told = {"name": "policy_preprocessor", "steps": [{"registry_name": "to_batch_processor", "config": {}}, step]}
        (folder / "policy_preprocessor.json").write_text(json.dumps(told))
    else:
        told = {"type": "pi0", "normalization_mapping": plain}
        if where == "converted":
            told = {"model_type": "omnimoe", "published": {"family": "pi0", "files": {"config.json": told}}}
        (folder / "config.json").write_text(json.dumps(told))


@pytest.mark.parametrize("where", ["preprocessor", "config", "converted"])
def test_how_numbers_are_normalised_is_read(where, folder, tmp_path):
    (tmp_path / NORMALIZER).write_bytes((folder / NORMALIZER).read_bytes())
    normalised("MEAN_STD", "MEAN_STD", where, tmp_path)
    assert set(read_scales(tmp_path)) == {"state", "action"}
    normalised("IDENTITY", "MEAN_STD", where, tmp_path)
    assert set(read_scales(tmp_path)) == {"action"}
    normalised("MEAN_STD", "QUANTILES", where, tmp_path)
    with pytest.raises(CheckpointError, match="normalises action by 'QUANTILES'.*scale the numbers yourself"):
        read_scales(tmp_path)


def test_statistics_without_mean_and_spread(tmp_path):
    save_file({"action.min": torch.zeros(2), "action.max": torch.ones(2)}, tmp_path / NORMALIZER)
    with pytest.raises(CheckpointError, match="action has no mean and std"):
        read_scales(tmp_path)
    normalised("MEAN_STD", "MIN_MAX", "preprocessor", tmp_path)
    with pytest.raises(CheckpointError, match="by 'MIN_MAX'"):
        read_scales(tmp_path)


def test_a_scale_and_its_inverse():
    scale, x = Scale([1.0, -2.0], [0.5, 0.0]), torch.tensor([[3.0, -2.0]])
    torch.testing.assert_close(scale.back(torch.nn.functional.pad(scale.into(x), (0, 3))), x)
    with pytest.raises(ValueError, match="std not negative"):
        Scale([1.0], [-1.0])


@pytest.mark.parametrize(("tall", "wide"), [(28, 28), (56, 28), (20, 61), (7, 14)])
def test_a_picture_on_a_black_square(tall, wide):
    seen = picture(0, tall, wide)
    found = on_square(Image.fromarray(seen), 28)
    assert found.shape == (28, 28, 3)
    ratio = max(tall, wide) / 28
    high, broad = int(tall / ratio), int(wide / ratio)
    top, left = (28 - high) // 2, (28 - broad) // 2
    assert (found[:top] == -1).all()
    assert (found[top + high :] == -1).all()
    assert (found[:, :left] == -1).all()
    assert (found[:, left + broad :] == -1).all()
    for row in range(high):  # the four pixels around each centre, weighed by their distance
        for column in range(broad):
            at = [
                min(max((place + 0.5) * size / count - 0.5, 0), size - 1)
                for place, size, count in ((row, tall, high), (column, wide, broad))
            ]
            low = [int(place) for place in at]
            value = np.zeros(3)
            for down in (0, 1):
                for right in (0, 1):
                    near = seen[min(low[0] + down, tall - 1), min(low[1] + right, wide - 1)]
                    share = abs(1 - down - (at[0] - low[0])) * abs(1 - right - (at[1] - low[1]))
                    value += share * near
            np.testing.assert_allclose(found[top + row, left + column], value / 255 * 2 - 1, atol=1e-4)


def test_times_of_training_are_beta():
    times = training_times(40_000, torch.Generator().manual_seed(0))
    assert 0.001 <= float(times.min()) < float(times.max()) <= 1.0
    beta = torch.distributions.Beta(1.5, 1.0)
    assert float(times.mean()) == pytest.approx(0.999 * float(beta.mean) + 0.001, abs=5e-3)
    assert float(times.std()) == pytest.approx(0.999 * float(beta.stddev), abs=5e-3)


def test_the_step_of_training_in_the_docs(pi0):
    page = (Path(__file__).parents[2] / "docs" / "pi0.md").read_text(encoding="utf-8")
    step = page.split("```python")[2].split("```")[0]
    names = {"torch": torch, "pi0": pi0, "actions": torch.randn(2, 5, 7), "pictures": [[picture(0)]] * 2}
    names |= {"instructions": ["cup", "pick up cup"], "states": torch.randn(2, 6)}
    exec(compile(step, "docs/pi0.md", "exec"), names)  # noqa: S102 - our own page
    assert names["out"].losses["action"].isfinite()
    assert pi0.model.model.modalities["state"].connector.proj.weight.grad.any()
    pi0.model.zero_grad()


def test_pictures_by_their_paths(pi0, tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "base.png")
    by_path = pi0.batch([[str(tmp_path / "base.png")]], ["cup"], torch.ones(1, 6))
    as_array = pi0.batch([picture(0)], ["cup"], torch.ones(1, 6))
    assert torch.equal(by_path["features"]["vision"]["patches"], as_array["features"]["vision"]["patches"])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (([[picture(0)]], "cup", np.ones((1, 6))), "must be lists"),
        (([[picture(0)]], ["cup", "up"], np.ones((2, 6))), "got 1 lists of pictures, 2 instructions"),
        (([[picture(0)]], ["cup"], np.ones(6)), r"states \(6,\)"),
        (([[picture(0)]], ["cup"], np.ones((1, 9))), "at most 6 numbers"),
        (([[picture(0)]], ["cup " * 40], np.ones((1, 6))), "trained with at most 48; say it shorter"),
        (([], [], np.ones((0, 6))), "for each sample"),
    ],
)
def test_samples_that_mean_nothing(pi0, given, told):
    with pytest.raises(ValueError, match=told):
        pi0.act(*given)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"steps": 2.5}, "steps must be a whole number, got 2.5"), ({"seed": -1}, "seed must be at least 0, got -1")],
)
def test_choices_out_of_range(pi0, options, told):
    with pytest.raises(ValueError, match=told):
        pi0.act([[picture(0)]], ["cup"], np.ones((1, 6)), **options)


def test_noise_of_another_shape(pi0):
    with pytest.raises(ValueError, match=r"noise must be \(1, 5, 7\)"):
        pi0.act([[picture(0)]], ["cup"], np.ones((1, 6)), noise=torch.zeros(5, 7))
