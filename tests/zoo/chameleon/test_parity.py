"""Chameleon against transformers: tiny random models, published to a folder and loaded from it."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnimoe import CheckpointError, OmniMoeForCausalLM, convert_checkpoint, from_pretrained
from omnimoe.convert import to_published
from omnimoe.zoo.chameleon import CHAMELEON
from tests.zoo.chameleon.tiny import CELLS, FIRST_CODE, FORMS, decoder_tensors, pictures, publish, published_model
from tests.zoo.weights import assert_same_tensors, stored

BEGIN, END, TURN, IMAGE = 37, 36, 38, 39
BOUND = 1e-5


@pytest.fixture(scope="module", params=FORMS)
def pair(request, tmp_path_factory):
    """transformers' model, its folder, and the same folder as a model of ours; 34b has its codes out of order."""
    theirs = published_model(request.param, is_mixed=request.param == "34b")
    folder = publish(theirs, tmp_path_factory.mktemp(request.param))
    return theirs, folder, from_pretrained(folder)


def words(count: int, seed: int) -> list[int]:
    return torch.randint(40, 290, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


DOCUMENTS: list[list[int | list[int]]] = [
    [0, words(3, 1), words(2, 2), 0, TURN],
    [words(5, 3), 1, 2, words(1, 4)],
    [words(7, 5)],
]
"""Lists are words, 0, 1 and 2 pictures."""


def laid_out(model: OmniMoeForCausalLM, documents, side: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Ids for us, with codes; ids for transformers, with placeholders; the mask; and the pixels for transformers."""
    image = model.config.token_ranges["image"]
    codes = model.model.modalities["image"].encode(pictures(3)) + image.start
    mine, others, shown = [], [], []
    for document in documents:
        own, other = [0], [0]
        for part in document:
            if part in (0, 1, 2):
                own += [BEGIN, *codes[part].tolist(), END]
                other += [BEGIN, *[IMAGE] * CELLS, END]
                shown.append(part)
            else:
                own, other = own + ([part] if part == TURN else part), other + ([part] if part == TURN else part)
        mine.append(own)
        others.append(other)
    length = max(map(len, mine))

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        gap = [[fill] * (length - len(row)) for row in rows]
        return torch.tensor([row + pad if side == "right" else pad + row for row, pad in zip(rows, gap, strict=True)])

    mask = padded([[1] * len(row) for row in mine], 0)
    return padded(mine, 1), padded(others, 1), mask, pictures(3)[shown] if shown else None


def of_kind(kind: str) -> list:
    """Documents of words and pictures, or of one alone."""
    if kind == "interleaved":
        return DOCUMENTS
    return [[part for part in document if isinstance(part, list) == (kind == "words")] for document in DOCUMENTS]


def run_theirs(theirs, ids: Tensor, mask: Tensor, pixels: Tensor | None, **options):
    """Their hidden states and the logits they would give if they did not hide those of picture codes."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    out = theirs.model(ids, pixel_values=pixels, attention_mask=mask, position_ids=positions, **options)
    return out, theirs.lm_head(out.last_hidden_state)


def assert_near(found: Tensor, wanted: Tensor, bound: float = BOUND) -> None:
    assert found.shape == wanted.shape
    assert torch.isfinite(wanted).all()
    assert float((found - wanted).norm() / wanted.norm()) < bound


@torch.no_grad()
def test_codes_of_pictures(pair):
    theirs, _, ours = pair
    wanted = theirs.get_image_tokens(pictures(12, 9))
    found = ours.model.modalities["image"].encode(pictures(12, 9)) + FIRST_CODE
    assert torch.equal(found, wanted.long())
    assert len(found.unique()) > 15
    assert (ours.config.modalities[1].codes == ()) == (not theirs.config.swin_norm)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["interleaved", "words", "pictures"])
@torch.no_grad()
def test_logits_and_hidden_states_of_a_padded_batch(pair, side, kind):
    theirs, _, ours = pair
    mine, others, mask, pixels = laid_out(ours, of_kind(kind), side)
    wanted, logits = run_theirs(theirs, others, mask, pixels, output_hidden_states=True)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = ours(mine, attention_mask=mask, position_ids=positions, output_hidden_states=True)
    real = mask.bool()
    assert_near(found.logits[real], logits[real])
    for layer, other in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert_near(layer[real], other[real])
    hidden = theirs(others, pixel_values=pixels, attention_mask=mask, position_ids=positions).logits
    plain = ours.config.modality_of_ids() == 0
    assert_near(found.logits[real][:, plain], hidden[real][:, plain])


@torch.no_grad()
def test_a_document_is_the_same_without_a_batch(pair):
    _, _, ours = pair
    mine, _, mask, _ = laid_out(ours, DOCUMENTS, "left")
    together = ours(mine, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    for row in range(3):
        alone = ours(mine[row, mask[row].bool()].unsqueeze(0)).logits[0]
        assert_near(together[row, mask[row].bool()], alone)


@pytest.mark.parametrize("kind", ["interleaved", "words", "pictures"])
@torch.no_grad()
def test_prefill_in_pieces_and_cached_steps(pair, kind):
    """Theirs over the whole, ours in two pieces that cut through a picture and then token by token."""
    theirs, _, ours = pair
    mine, others, mask, pixels = laid_out(ours, of_kind(kind), "left")
    _, wanted = run_theirs(theirs, others, mask, pixels)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    length = mine.shape[1]
    cuts, cache, found = sorted({0, min(5, length), min(11, length), *range(min(30, length), length + 1)}), None, []
    for start, stop in itertools.pairwise(cuts):
        out = ours(
            mine[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        found.append(out.logits)
    real = mask.bool()
    assert_near(torch.cat(found, dim=1)[real], wanted[real])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["interleaved", "words", "pictures"])
def test_gradients(pair, kind, side, tmp_path):
    """Of a mixed loss over a padded batch; theirs, published as if they were weights, are ours."""
    theirs, _, ours = pair
    mine, others, mask, pixels = laid_out(ours, of_kind(kind), side)
    for model in (ours, theirs):
        model.zero_grad()
    real = mask.bool()
    labels = mine[:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), -100).flatten()
    _, logits = run_theirs(theirs, others, mask, pixels)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels).backward()
    out = ours(mine, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), labels=mine)
    out.loss.backward()
    assert {name for name, count in out.counts.items() if count} == {"text", *(["image"] if kind != "words" else [])}
    twin = published_model("34b" if theirs.config.swin_norm else "7b")
    with torch.no_grad():
        for held, other in zip(twin.parameters(), theirs.parameters(), strict=True):
            held.copy_(torch.zeros_like(held) if other.grad is None else other.grad)
    wanted = from_pretrained(publish(twin, tmp_path / "gradients"))
    for (name, parameter), (_, other) in zip(ours.named_parameters(), wanted.named_parameters(), strict=True):
        assert parameter.grad is not None, name
        scale = max(float(other.detach().norm()), 1e-6)
        assert float((parameter.grad - other.detach()).norm()) / scale < BOUND, name


def test_greedy_words_of_a_padded_batch(pair):
    """What transformers writes, which hides codes; here without the grammar, the codes suppressed."""
    theirs, _, ours = pair
    mine, others, mask, pixels = laid_out(ours, DOCUMENTS, "left")
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    codes = (ours.config.modality_of_ids() == 1).nonzero().flatten().tolist()
    found = ours.generate(mine, free=True, suppress_tokens=codes, **options)
    wanted = theirs.generate(others, pixel_values=pixels, **options)
    assert torch.equal(found[:, mine.shape[1] :], wanted[:, mine.shape[1] :])


@pytest.mark.parametrize("size", ["5GB", 40_000])
def test_the_way_there_and_back_keeps_every_bit(pair, tmp_path, size):
    theirs, folder, ours = pair
    there = convert_checkpoint(folder, tmp_path / "ours", max_shard_size=size)
    assert there.family == "chameleon"
    again = from_pretrained(tmp_path / "ours")
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert not any("autoencoder" in name for name, _ in again.named_parameters()), "it is never trained"
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="published")
    convert_checkpoint(ours, tmp_path / "model", to="published")
    for made in ("back", "model"):
        assert_same_tensors(stored(tmp_path / made), stored(folder))
        read = type(theirs).from_pretrained(tmp_path / made).config.to_dict()
        assert read == type(theirs).from_pretrained(folder).config.to_dict() | {"_name_or_path": str(tmp_path / made)}
    assert (tmp_path / "back" / "tokenizer.json").is_file()


def test_a_sharded_folder_of_mixed_types(pair, tmp_path):
    """The language model in bfloat16 and its autoencoder in float32 keep their types from folder to folder."""
    theirs, _, _ = pair
    half = type(theirs)(theirs.config)
    half.load_state_dict(theirs.state_dict())
    half.to(torch.bfloat16).model.vqmodel.float()
    folder = publish(half, tmp_path / "half", max_shard_size=60_000)
    assert (folder / "model.safetensors.index.json").is_file()
    loaded = from_pretrained(folder, dtype="bfloat16")
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}
    convert_checkpoint(folder, tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="published")
    held = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in held.items()} == {name: part.dtype for name, part in found.items()}
    assert all(torch.equal(tensor, found[name]) for name, tensor in held.items())
    assert len({tensor.dtype for tensor in held.values()}) == 2


@pytest.fixture(scope="module")
def drawing(pair, tmp_path_factory):
    """The folder with the decoder of the codes."""
    made = publish(pair[0], tmp_path_factory.mktemp("decoder"))
    save_file({**load_file(made / "model.safetensors"), **decoder_tensors()}, made / "model.safetensors")
    return made


class TestDecoder:
    """A checkpoint whose codes can be made pictures again."""

    def test_it_is_read_and_written_where_the_weights_have_it(self, drawing, tmp_path):
        model = from_pretrained(drawing)
        assert model.config.modalities[1].autoencoder.has_decoder
        made = model.model.modalities["image"].decode(torch.zeros(2, CELLS, dtype=torch.int64))
        assert made.shape == (2, 3, 8, 8)
        convert_checkpoint(drawing, tmp_path / "ours")
        convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="published")
        assert_same_tensors(stored(tmp_path / "back"), stored(drawing))
        to_published(model, tmp_path / "again")
        assert_same_tensors(stored(tmp_path / "again"), stored(drawing))
        assert from_pretrained(tmp_path / "again").config.to_dict() == model.config.to_dict()

    def test_a_half_decoder_is_refused(self, drawing, tmp_path):
        held = load_file(drawing / "model.safetensors")
        held.pop("model.vqmodel.decoder.up.1.upsample.conv.weight")
        save_file(held, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((drawing / "config.json").read_text())
        with pytest.raises(CheckpointError, match=r"(?s)1 missing:.*decoder\.up\.1\.upsample\.conv\.weight"):
            from_pretrained(tmp_path)

    def test_without_one_codes_stay_codes(self, pair):
        _, _, ours = pair
        with pytest.raises(ValueError, match="published without its decoder"):
            ours.model.modalities["image"].decode(torch.zeros(1, CELLS, dtype=torch.int64))


def shifted(words: dict[str, int]) -> None:
    words.update({word: row + 996 for word, row in words.items() if word.startswith("IMGIMG")})


class TestVocabulary:
    """What the map of words says and cannot say."""

    def config(self, pair, **changes) -> dict:
        plain = json.loads((pair[1] / "config.json").read_text())
        plain["vocabulary_map"] = {**plain["vocabulary_map"], **changes}
        return plain

    def test_the_map_knows_the_ids_of_documents_better_than_the_config(self, pair):
        config = CHAMELEON.config_of(self.config(pair))
        assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, 1, 2)
        assert json.loads((pair[1] / "config.json").read_text())["bos_token_id"] == 1

    def test_words_may_be_called_as_fields_are(self, pair):
        config = CHAMELEON.config_of(self.config(pair, layers=4200, num_heads=2**21))
        assert config.token_ranges["image"].start == FIRST_CODE

    def test_the_other_name_of_the_type_is_read(self, pair):
        assert CHAMELEON.config_of({**self.config(pair), "model_type": "anole"}).num_layers == 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda words: words.clear(), "has no vocabulary_map"),
            (lambda words: words.pop("IMGIMGDBZ"), "names 31 codes of pictures, and the autoencoder has 32"),
            (lambda words: words.update(IMGIMGDBZ=250), "scattered over the ids"),
            (lambda words: words.update(IMGIMGDCZ=250), "names 33 codes"),
            (lambda words: words.update(IMGIMGAZ="4"), "is malformed"),
            (shifted, "has id 1031, and the vocabulary 296 rows"),
            (lambda words: words.pop("<eoss>"), "has no <eoss>, which stands around a picture"),
        ],
    )
    def test_a_map_that_does_not_fit_is_refused(self, pair, change, message):
        plain = self.config(pair)
        change(plain["vocabulary_map"])
        with pytest.raises(CheckpointError, match=message):
            CHAMELEON.config_of(plain)

    def test_what_the_script_of_conversion_leaves_in_the_config_is_no_matter(self, pair):
        plain = self.config(pair)
        left = {
            "ch": 32,
            "ch_mult": [1, 2],
            "out_channels": 3,
            "double_z": False,
            "z_channels": 8,
            "monitor": "val/loss",
        }
        config = CHAMELEON.config_of({**plain, "vq_config": {**plain["vq_config"], **left}})
        assert config.modalities == pair[2].config.modalities

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"mlp_bias": True}, "mlp_bias is True"),
            ({"vq_config": {"double_latent": True}}, "double_latent is True"),
            ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic' is not"),
        ],
    )
    def test_what_the_parts_here_do_not_do_is_refused(self, pair, changes, message):
        with pytest.raises(CheckpointError, match=message):
            CHAMELEON.config_of({**self.config(pair), **changes})
