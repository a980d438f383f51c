"""VLMo against a loop over published names, and its files to the bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import omnimoe
from omnimoe.checkpoint import CheckpointError
from omnimoe.checkpoint.errors import MisfitError
from omnimoe.convert import find_converter, to_omnimoe, to_published
from omnimoe.zoo.vlmo.convert import KEPT, VLMO
from tests.zoo.hollow import loads_and_saves
from tests.zoo.vlmo.oracle import TINY, pair_logits, published_list, rows_of, word_logits
from tests.zoo.weights import close, gradients_of, published_of, random_model, write_folder

LENGTHS = (6, 4, 1)


@pytest.fixture(scope="module")
def model():
    return random_model(VLMO, TINY)


@pytest.fixture(scope="module")
def weights(model):
    return published_of(VLMO, model)


@pytest.fixture(scope="module")
def doubles(weights):
    return {name: held.double() for name, held in weights.items()}


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("published"), {**TINY, "heads": []}, weights)


def inputs(which: str = "both", *, left: bool = False) -> tuple[dict, list[tuple]]:
    """A batch for ours, texts of several lengths padded in front of the picture or of themselves; and its parts."""
    made = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 12, 12, generator=made)
    texts = [torch.randint(3, 50, (length,), generator=made).tolist() for length in LENGTHS]
    ids, mask = torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.int64)
    given: dict = {}
    if which != "vision":
        ids, mask = torch.zeros(3, 6, dtype=torch.int64), torch.zeros(3, 6, dtype=torch.int64)
        for row, text in enumerate(texts):
            place = slice(6 - len(text), None) if left else slice(len(text))
            ids[row, place], mask[row, place] = torch.tensor(text), 1
    if which != "text":
        ids, mask = torch.cat((ids, torch.ones(3, 10).long()), 1), torch.cat((mask, torch.ones(3, 10).long()), 1)
        cells = pixels.unflatten(3, (3, 4)).unflatten(2, (3, 4)).permute(0, 2, 4, 3, 5, 1).reshape(3, 9, 48)
        given["features"] = {"vision": {"patches": cells}}
    given |= {"input_ids": ids, "attention_mask": mask}
    return given, [
        (None if which == "text" else pixels[row], None if which == "vision" else texts[row]) for row in range(3)
    ]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("which", ["both", "text", "vision"])
def test_rows_words_and_pairs(model, doubles, which, left):
    given, parts = inputs(which, left=left)
    with torch.no_grad():
        out = model(**given, output_hidden_states=[-1])
        pairs = model.pool(**given)
    for row, (pixels, words) in enumerate(parts):
        wanted = rows_of(doubles, TINY, None if pixels is None else pixels.double(), words)
        real = given["attention_mask"][row].bool()
        close(out.hidden_states[-1][row][real], wanted)
        close(out.logits[row][real], word_logits(doubles, wanted))
        close(pairs[row], pair_logits(doubles, wanted))


@pytest.mark.parametrize(
    ("which", "left"),
    [("both", False), ("both", True), ("text", False), ("text", True), ("vision", False)],
    ids=["both, right", "both, left", "text, right", "text, left", "vision"],
)
def test_gradients(model, weights, which, left):
    """Of every published tensor, ours in float32, on padded batches, and with a modality absent."""
    given, parts = inputs(which, left=left)
    real = given["attention_mask"].bool()
    made = torch.Generator().manual_seed(2)
    factors, pair_factors = torch.randn(*real.shape, 60, generator=made), torch.randn(3, 2, generator=made)
    model.zero_grad()
    aligned = 0 * sum(held.sum() for held in model.aligned.parameters())
    ((model(**given).logits * factors)[real].sum() + (model.pool(**given) * pair_factors).sum() + aligned).backward()
    leaves = {name: held.double().requires_grad_() for name, held in weights.items()}
    total = torch.zeros(())
    for row, (pixels, words) in enumerate(parts):
        rows = rows_of(leaves, TINY, None if pixels is None else pixels.double(), words)
        total = total + (word_logits(leaves, rows) * factors[row][real[row]]).sum()
        total = total + (pair_logits(leaves, rows) * pair_factors[row]).sum()
    total.backward()
    for name, found in gradients_of(VLMO, model).items():
        wanted = leaves[name].grad
        if wanted is None or not wanted.any():
            assert not found.any(), name
        else:
            close(found, wanted)


def test_vectors(model, doubles):
    """Each modality by itself, through its own networks; with the key of both, through the joint ones."""
    given, parts = inputs("text")
    stem = model.model.modalities["vision"].get_encoder()
    with torch.no_grad():
        read = model.align("text", given["input_ids"], attention_mask=given["attention_mask"])
        seen = model.align("vision", inputs("vision")[0]["features"]["vision"])
        joint = model.encode("text", given["input_ids"][:1], key="joint_text")[0]
    for row, (_, words) in enumerate(parts):
        close(
            read[row], F.normalize(doubles["itc_text_proj.fc.weight"] @ rows_of(doubles, TINY, None, words)[0], dim=0)
        )
    for row, (pixels, _) in enumerate(inputs("vision")[1]):
        rows = rows_of(doubles, TINY, pixels.double(), None)
        close(seen[row], F.normalize(doubles["itc_image_proj.fc.weight"] @ rows[0], dim=0))
    close(joint, rows_of(doubles, TINY, None, parts[0][1], joint=True))
    assert stem.mask_token is None
    with pytest.raises(ValueError, match="no row for hidden ones"):
        stem({"patches": torch.zeros(1, 9, 48), "masked": torch.zeros(1, 9).bool()})


def test_from_raw_pictures_to_answers(model):
    """As docs/earlier.md has it, in half precision too."""
    raws = [np.full((20, 30, 3), 10 * place, dtype=np.uint8) for place in range(2)]
    vision = model.model.modalities["vision"]
    seen = vision.get_encoder().prepare(raws)
    ids, mask = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    spans = torch.stack(vision.span_ids(seen))
    pairs = {
        "input_ids": torch.cat((ids, spans), dim=1),
        "attention_mask": torch.cat((mask, torch.ones_like(spans)), dim=1),
        "features": {"vision": seen},
    }
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        cosines = model.align("vision", seen) @ model.align("text", ids, attention_mask=mask).T
        assert cosines.shape == (2, 2)
        fits = model.pool(**pairs).softmax(-1)
        torch.testing.assert_close(half.pool(**pairs).float().softmax(-1), fits, atol=0.1, rtol=0.1)
        assert half(**pairs).logits.dtype == torch.bfloat16


def test_packed_documents(model, doubles):
    """A text, and behind it in the same row a text with a picture: only the second is of both."""
    given, parts = inputs()
    (_, alone), (pixels, words) = parts[0], parts[1]
    ids = torch.tensor([[*alone, *words, *[1] * 10]])
    segments = torch.tensor([[0] * len(alone) + [1] * (len(words) + 10)])
    features = {"vision": {"patches": given["features"]["vision"]["patches"][1:2]}}
    with torch.no_grad():
        found = model.model(input_ids=ids, segment_ids=segments, features=features).last_hidden_state[0]
    close(found[: len(alone)], rows_of(doubles, TINY, None, alone))
    close(found[len(alone) :], rows_of(doubles, TINY, pixels.double(), words))


def test_a_folder_to_the_bit(weights, model, folder, tmp_path):
    assert find_converter(folder) is VLMO
    read = omnimoe.from_pretrained(folder)
    assert read.config.published["files"]["config.json"]["heads"] == ["words", "pairs", "aligned"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    to_omnimoe(folder, tmp_path / "ours", VLMO, max_shard_size="40KB")
    to_published(tmp_path / "ours", tmp_path / "theirs")
    back = load_file(tmp_path / "theirs" / "model.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


def test_heads_and_what_goes_along(weights, tmp_path):
    """A file that was tuned for retrieval: maps, no words; its pooler, and tables that are computed, go along."""
    kept = {name: held for name, held in weights.items() if not name.startswith(("mlm_", "itm_"))}
    rest = {"relative_position_index": torch.zeros(10, 10), "itc_vl_text_proj.fc.weight": torch.randn(32, 32)}
    published = write_folder(tmp_path / "theirs", TINY, kept | rest)
    model = omnimoe.from_pretrained(published)
    assert (model.config.head_bias, model.head_layer, model.pooled) == (False, None, None)
    with pytest.raises(omnimoe.InputError, match="pooled_labels 0"):
        model.pool(input_ids=torch.tensor([[3, 4]]))
    to_omnimoe(published, tmp_path / "ours", VLMO)
    along = load_file(tmp_path / "ours" / KEPT)
    assert along.keys() == {"pooler.dense.weight", "pooler.dense.bias", *rest}
    assert all(torch.equal(held, (kept | rest)[name]) for name, held in along.items())
    to_published(tmp_path / "ours", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == {*kept, *rest}
    assert all(torch.equal(held, (kept | rest)[name]) for name, held in back.items())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"transformer.blocks.2.mlp_vl.fc1.bias": None}, "blocks.2.mlp_vl.fc1.bias"),
        ({"transformer.blocks.1.mlp_vl.fc1.bias": torch.zeros(128)}, "blocks.1.mlp_vl.fc1.bias"),
        ({"transformer.blocks.0.attn.qkv.weight": torch.zeros(90, 32)}, "attn.qkv.weight"),
        ({"relative_position_bias_table": torch.zeros(70, 12)}, "relative_position_bias_table"),
    ],
    ids=["missing", "extra", "misshapen", "another picture size"],
)
def test_what_does_not_fit_is_named(weights, tmp_path, change, told):
    held = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
    with pytest.raises(MisfitError, match=told):
        omnimoe.from_pretrained(write_folder(tmp_path, TINY, held))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"use_abs_pos_emb": True}, "use_abs_pos_emb is True"),
        ({"heads": ["answers"]}, "heads names 'answers'"),
        ({"vlffn_start_layer_index": 4}, "vlffn_start_layer_index 4"),
        ({"patch_size": 5}, "patch_size 5 must divide image_size 12"),
        ({"depth": None}, "malformed"),
    ],
)
def test_what_is_not_converted_is_refused(change, told):
    with pytest.raises(CheckpointError, match=told):
        VLMO.config_of({**TINY, **change})


def test_a_text_past_the_table_is_refused(model):
    with pytest.raises(ValueError, match="distance 9 is past the distances below 9"):
        model(input_ids=torch.full((1, 11), 5))


@pytest.mark.parametrize(
    ("name", "sizes", "millions"),
    [("vlmo_base", (768, 12, 12, 10, 14), 175), ("vlmo_large", (1024, 24, 16, 21, 14), 562)],
)
def test_published_list_at_full_size(name, sizes, millions, tmp_path):
    """The names of the authors' code, and the counts that they print, which leave the heads out."""
    model = omnimoe.load(name, device="meta")
    found = VLMO.plan(model).published
    assert found == published_list(*sizes)
    loads_and_saves(name, found, tmp_path)
    heads = ("mlm_score.", "pooler.", "itm_score.", "itc_", "logit_scale")
    count = sum(torch.Size(shape).numel() for key, shape in found.items() if not key.startswith(heads))
    assert abs(count / 1e6 - millions) < 0.7
