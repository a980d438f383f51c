"""BEiT-3 at a tiny size: our model gives what torchscale's gives, and its files are read and written to the bit."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import omnimoe
from omnimoe.checkpoint import CheckpointError
from omnimoe.checkpoint.errors import MisfitError
from omnimoe.convert import find_converter, to_omnimoe, to_published
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.zoo.beit3 import BEIT3
from tests.zoo.beit3.peer import TINY, Peer, equal_weights, for_ours, make_peer, published, side_by_side, torchscale
from tests.zoo.hollow import loads_and_saves
from tests.zoo.weights import close

torchscale()
PLAIN = published(**TINY, kinds=("words", "aligned"))
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]).bool()


@pytest.fixture(scope="module")
def peer() -> Peer:
    torch.manual_seed(0)
    return make_peer(PLAIN)


@pytest.fixture(scope="module")
def model(peer) -> OmniMoeForCausalLM:
    return equal_weights(peer, PLAIN)


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
    made = tmp_path_factory.mktemp("published")
    given = {name: value for name, value in PLAIN.items() if name not in ("heads", "model_type")}
    (made / "config.json").write_text(json.dumps(given))
    save_file({name: tensor.contiguous() for name, tensor in peer.state_dict().items()}, made / "model.safetensors")
    return made


def batch(seed: int = 0, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 12, 12, generator=made), torch.randint(3, 50, (count, 5), generator=made)


BATCHES = pytest.mark.parametrize(
    ("which", "padding"),
    [("vision", None), ("both", None), ("both", PADDING), ("text", None), ("text", PADDING), ("text", PADDING.flip(1))],
    ids=["vision", "both", "both, right", "text", "text, right", "text, left"],
)


def ask_peer(peer: Peer, pixels, words, padding, **given) -> torch.Tensor:
    """Rows of the reference, which counts padding too; a text of ours begins where its padding ends."""
    is_left = padding is not None and bool(padding[:, 0].any())
    positions = (~padding).long().cumsum(1) + 1 if is_left else None
    given |= {"text_padding_position": padding, "positions": positions}
    return peer(textual_tokens=words, visual_tokens=pixels, **given)


@BATCHES
def test_rows_of_both_modalities(model, peer, which, padding):
    pixels, words = batch()
    pixels = None if which == "text" else pixels
    words = None if which == "vision" else words
    with torch.no_grad():
        wanted = ask_peer(peer, pixels, words, padding)
        given = for_ours(model, pixels, words, padding)
        found = model.model(**given).last_hidden_state
    real = given.get("attention_mask", torch.ones(wanted.shape[:2])).bool()
    close(found[real], wanted[real])


def test_padding_in_front_changes_nothing(model):
    pixels, words = batch()
    with torch.no_grad():
        short = model(**for_ours(model, pixels, words[:, :3], None)).logits
        for at in (0, 10):
            given = for_ours(model, pixels, words[:, :3], None)
            ids = given["input_ids"]
            padded = torch.cat((ids[:, :at], torch.ones(3, 2, dtype=torch.long), ids[:, at:]), dim=1)
            mask = torch.ones_like(padded)
            mask[:, at : at + 2] = 0
            found = model(input_ids=padded, attention_mask=mask, features=given["features"]).logits
            close(found[mask.bool()], short.flatten(0, 1))


def test_every_layer(model, peer):
    pixels, words = batch()
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: seen.append(out[0]))
        for layer in peer.beit3.encoder.layers
    ]
    with torch.no_grad():
        peer(textual_tokens=words, visual_tokens=pixels)
        out = model(**for_ours(model, pixels, words, None), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    for found, wanted in zip(out.hidden_states[1:-1], seen[:-1], strict=True):
        close(found, wanted)


def test_words_under_a_mask(model, peer):
    pixels, words = batch()
    with torch.no_grad():
        wanted = peer.mlm_head(peer(textual_tokens=words, visual_tokens=pixels))
        close(model(**for_ours(model, pixels, words, None)).logits, wanted)


def test_patches_under_a_mask(model, peer):
    pixels, words = batch()
    hidden = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.4
    given = for_ours(model, pixels, words, None)
    given["features"]["vision"]["masked"] = hidden
    with torch.no_grad():
        wanted = peer(textual_tokens=words, visual_tokens=pixels, vision_masked_position=hidden)
        close(model.model(**given).last_hidden_state, wanted)


def test_a_caption_sees_the_picture_and_what_it_said(peer):
    """As the original writes captions: pictures see themselves, text them and what stands before it."""
    plain = BEIT3.config_of(PLAIN)
    writes = equal_weights(peer, PLAIN)
    config = plain.replace(mask="block_causal", bidirectional_modalities=("vision",))
    model = OmniMoeForCausalLM(config).eval()
    model.load_state_dict(writes.state_dict())
    pixels, words = batch()
    length, seen = 15, 10
    may = torch.zeros(length, length)
    may[:, :seen] = 1
    may[seen:, seen:] = torch.ones(5, 5).tril()
    with torch.no_grad():
        wanted = peer(textual_tokens=words, visual_tokens=pixels, attn_mask=1 - may)
        close(model.model(**for_ours(model, pixels, words, None)).last_hidden_state, wanted)
        whole = model(**for_ours(model, pixels, words, None)).logits
        given = for_ours(model, pixels, words[:, :2], None)
        out = model(**given, use_cache=True)
        parts = [out.logits]
        for place in range(2, 5):
            out = model(
                input_ids=words[:, place : place + 1],
                position_ids=torch.full((3, 1), place),
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            parts.append(out.logits)
    close(torch.cat(parts, dim=1), whole)
    made = model.generate(**for_ours(model, pixels, words[:, :2], None), max_new_tokens=3, do_sample=False)
    grown = words[:, :2]
    with torch.no_grad():
        for _ in range(3):
            grown = torch.cat((grown, model(**for_ours(model, pixels, grown, None)).logits[:, -1:].argmax(-1)), dim=1)
    assert made[:, seen:].tolist() == grown.tolist()


def test_vectors_of_pictures_and_texts(model, peer):
    pixels, words = batch()
    encoder = model.model.modalities["vision"].encoder
    with torch.no_grad():
        seen = F.normalize(peer.vision_head(peer(visual_tokens=pixels)[:, 0]), dim=-1)
        read = F.normalize(peer.language_head(peer(textual_tokens=words, text_padding_position=PADDING)[:, 0]), dim=-1)
        close(model.align("vision", encoder.patches(pixels)), seen)
        close(model.align("text", words, attention_mask=~PADDING), read)
        scores = peer.logit_scale.exp() * seen @ read.T
        wanted = (F.cross_entropy(scores, torch.arange(3)) + F.cross_entropy(scores.T, torch.arange(3))) / 2
        close(model.contrast(seen, read), wanted)


@BATCHES
def test_gradients_of_every_published_tensor(model, peer, which, padding):
    pixels, words = batch()
    pixels = None if which == "text" else pixels
    words = None if which == "vision" else words
    given, hidden = for_ours(model, pixels, words, padding), {}
    if pixels is not None:
        masked = torch.zeros(3, 9).bool()
        masked[:, ::2] = True
        given["features"]["vision"]["masked"] = hidden["vision_masked_position"] = masked
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    factors = torch.randn(*real.shape, PLAIN["vocab_size"], generator=torch.Generator().manual_seed(3))
    peer.zero_grad()
    (peer.mlm_head(ask_peer(peer, pixels, words, padding, **hidden)) * factors)[real].sum().backward()
    model.zero_grad()
    (model(**given).logits * factors)[real].sum().backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    theirs = {name: parameter.grad for name, parameter in peer.named_parameters()}
    compared = 0
    for piece in BEIT3.plan(model).pieces:
        wanted, found = theirs[piece.published], ours[piece.ours]
        if wanted is None:
            assert found is None or not piece.place(found).any(), piece.published
            continue
        wanted, found = piece.change.into(wanted), piece.place(found)
        # keys have no gradient along their bias: softmax does not see it
        assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm()) + 1e-5, piece.published
        compared += bool(wanted.any())
    assert compared >= {"both": 89, "text": 44, "vision": 47}[which]


@pytest.mark.parametrize("which", ["text", "vision"])
def test_an_absent_modality_gets_zero_gradients(model, which):
    pixels, words = batch()
    model.zero_grad()
    given = for_ours(model, pixels if which == "vision" else None, words if which == "text" else None, None)
    out = model(**given, labels=given["input_ids"])
    (out.logits.sum() if which == "vision" else out.loss).backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("aligned.") or which == "text":
            assert parameter.grad is not None, name
    copy = {"text": 1, "vision": 0}[which]
    assert not model.model.backbone.layers[0].mlp.gate_up_proj.weight.grad[copy].any()


def test_a_folder_to_the_bit(peer, model, folder, tmp_path):
    assert find_converter(folder) is BEIT3
    read = omnimoe.from_pretrained(folder)
    assert read.config.published["files"]["config.json"]["heads"] == ["words", "aligned"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    to_omnimoe(folder, tmp_path / "ours", BEIT3, max_shard_size="40KB")
    to_published(tmp_path / "ours", tmp_path / "theirs")
    back = load_file(tmp_path / "theirs" / "model.safetensors")
    wanted = peer.state_dict()
    assert set(back) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(back[name], tensor), name
    fresh = make_peer(PLAIN)
    fresh.load_state_dict(back)


@pytest.mark.parametrize("kinds", [(), ("words",), ("aligned",)], ids=["none", "words", "aligned"])
def test_heads_are_read_off_the_weights(peer, folder, tmp_path, kinds):
    names = {"words": ("mlm_head.",), "aligned": ("language_head.", "vision_head.", "logit_scale")}
    kept = ("beit3.", *(name for kind in kinds for name in names[kind]))
    held = {name: tensor.contiguous() for name, tensor in peer.state_dict().items() if name.startswith(kept)}
    held |= {"head.weight": torch.zeros(2, 32), "pooler.dense.bias": torch.zeros(32)}
    save_file(held, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = omnimoe.from_pretrained(tmp_path)
    assert (model.config.head_bias, model.aligned is not None) == ("words" in kinds, "aligned" in kinds)
    if not model.aligned:
        with pytest.raises(omnimoe.InputError, match="aligned_size 0"):
            model.align("text", torch.tensor([[3, 4]]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"beit3.encoder.layers.1.ffn.B.fc1.bias": None}, "ffn.B.fc1.bias"),
        ({"beit3.encoder.layers.2.ffn.B.fc1.bias": torch.zeros(48)}, "layers.2.ffn.B.fc1.bias"),
        ({"beit3.encoder.layers.1.ffn.B.fc1.bias": torch.zeros(40)}, "ffn.B.fc1.bias"),
        ({"beit3.encoder.embed_positions.A.weight": torch.zeros(14, 32)}, "embed_positions.A.weight"),
    ],
    ids=["missing", "extra", "misshapen", "another picture size"],
)
def test_what_does_not_fit_is_named(folder, tmp_path, change, told):
    held = load_file(folder / "model.safetensors") | change
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(MisfitError, match=told):
        omnimoe.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"deepnorm": True}, "deepnorm is True"),
        ({"normalize_output": False}, "normalize_output is False"),
        ({"no_output_layer": False}, "mlm_head"),
        ({"activation_fn": "tanh"}, "'tanh' has no counterpart"),
        ({"heads": ["labels"]}, "heads names 'labels'"),
        ({"patch_size": 5}, "patch_size 5 must divide image_size 12"),
        ({"vocab_size": None}, "does not fit|malformed"),
    ],
)
def test_what_is_not_converted_is_refused(change, told):
    with pytest.raises(CheckpointError, match=told):
        BEIT3.config_of({**PLAIN, **change})


@pytest.mark.parametrize(
    ("name", "millions", "tensors"),
    [("beit3_base", 271, 493), ("beit3_large", 739, 973), ("beit3_base_itc", 222, 494), ("beit3_large_itc", 675, 974)],
)
def test_published_list_at_full_size(name, millions, tensors, tmp_path):
    """Against torchscale's class on the meta device, and the counts that the authors print for a task's pictures."""
    model = omnimoe.load(name, device="meta")
    plain = model.config.published["files"]["config.json"]
    with torch.device("meta"):
        wanted = {key: tuple(held.shape) for key, held in Peer(plain).state_dict().items()}
    assert BEIT3.plan(model).published == wanted
    loads_and_saves(name, wanted, tmp_path)
    assert len(wanted) == tensors
    count = sum(math.prod(shape) for shape in wanted.values())
    side = {"beit3_base": 480, "beit3_large": 480}.get(name, 384)
    more = ((side // 16) ** 2 - 14**2) * plain["encoder_embed_dim"]
    assert abs((count + more) / 1e6 - millions) < 0.7


def test_positions_past_the_table_are_refused(model):
    words = torch.full((1, 19), 5)
    with pytest.raises(ValueError, match="position 18 of modality 0 is past its table of 20"):
        model(input_ids=words)


def test_side_by_side():
    ours, theirs = side_by_side(width=128, layers=1, length=8)
    with torch.no_grad():
        close(ours().last_hidden_state, theirs())
