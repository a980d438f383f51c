"""A BEiT-3 folder at a tiny size, from pictures and words to words and cosines."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer as Model
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from omnimoe.cli import main
from omnimoe.pipelines import find_pipeline
from omnimoe.pipelines.beit3 import MASK, Beit3, read_words
from omnimoe.tokenizers import TokenizerError
from tests.zoo.beit3.peer import TINY, make_peer, published, torchscale

torchscale()
PLAIN = published(**TINY, kinds=("words", "aligned"))
WORDS = {word: place for place, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a", "red", "cat", "sits"])}
WORDS |= {f"w{place}": place for place in range(len(WORDS), 58)} | {MASK: 58, "unused": 59}
BOS, EOS, MASKED = 0, 2, 58


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    return make_peer(PLAIN)


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
    made = tmp_path_factory.mktemp("published")
    (made / "config.json").write_text(json.dumps(PLAIN))
    save_file({name: tensor.contiguous() for name, tensor in peer.state_dict().items()}, made / "model.safetensors")
    words = Model(WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.save(str(made / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def beit3(folder) -> Beit3:
    found = find_pipeline(folder)
    assert found is not None
    kind, source = found
    assert kind is Beit3
    return kind.from_pretrained(source)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)


def pixels(*seeds: int) -> torch.Tensor:
    stacked = np.stack([picture(seed) for seed in seeds]).astype(np.float32)
    return torch.from_numpy(stacked / 127.5 - 1).permute(0, 3, 1, 2)


def word(place: int) -> str:
    return next(word for word, known in WORDS.items() if known == place)


def test_words_under_masks(beit3, peer):
    found = beit3.fill([[picture(0), "a <mask> cat <mask>"], "red <mask>"])
    assert [len(words) for words in found] == [2, 1]
    ids = torch.tensor([[BOS, 4, MASKED, 6, MASKED, EOS]])
    with torch.no_grad():
        both = peer.mlm_head(peer(textual_tokens=ids, visual_tokens=pixels(0)))[0, 10:].argmax(-1)
        alone = peer.mlm_head(peer(textual_tokens=torch.tensor([[BOS, 5, MASKED, EOS]])))[0].argmax(-1)
    assert found[0] == [word(int(i)) for i in (both[2], both[4])]
    assert found[1] == [word(int(alone[2]))]


@pytest.mark.parametrize("begun", ["", "a red"])
def test_captions_are_those_of_the_original(beit3, peer, begun):
    """Its own loop, without a cache: a mask behind what was said, under the original's mask of attention."""
    said = torch.tensor([[BOS, *[WORDS[held] for held in begun.split()]]]).expand(2, -1)
    seen = pixels(0, 1)
    start = said.shape[1]
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat((said, torch.full((2, 1), MASKED)), dim=1)
            length = 10 + ids.shape[1]
            may = torch.zeros(length, length)
            may[:, :10] = 1
            may[10:, 10:] = torch.ones(ids.shape[1], ids.shape[1]).tril()
            rows = peer(textual_tokens=ids, visual_tokens=seen, attn_mask=1 - may)
            said = torch.cat((said, peer.mlm_head(rows)[:, -1:].argmax(-1)), dim=1)
    wanted = []
    for row in said.tolist():
        new = row[start:]
        kept = row[1:start] + (new[: new.index(EOS)] if EOS in new else new)
        wanted.append(" ".join(word(i) for i in kept))
    documents = [[picture(0), begun], [picture(1), begun]] if begun else [[picture(0)], [picture(1)]]
    assert beit3.answer(documents, max_new_tokens=5) == wanted


def test_pictures_and_texts(beit3, peer):
    found = beit3.compare([picture(0), picture(1)], ["a red cat", "sits"])
    with torch.no_grad():
        seen = F.normalize(peer.vision_head(peer(visual_tokens=pixels(0, 1))[:, 0]), dim=-1)
        texts = [torch.tensor([[BOS, 4, 5, 6, EOS]]), torch.tensor([[BOS, 7, EOS]])]
        read = torch.cat([peer.language_head(peer(textual_tokens=ids)[:, 0]) for ids in texts])
    torch.testing.assert_close(found, seen @ F.normalize(read, dim=-1).T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda held: held.fill(["a cat"]), "document 0 has no <mask>"),
        (lambda held: held.answer(["a cat"]), "document 0 has no picture"),
        (lambda held: held.answer([[picture(0), "a"], [picture(1), "a cat"]]), "unequal number"),
        (lambda held: held.answer([[picture(0)]], num_beams=3), "num_beams"),
        (lambda held: held.fill([[picture(0), picture(1), "<mask>"]]), "2 pictures and 1 texts"),
        (lambda held: held.fill("a <mask>"), "list of documents"),
    ],
)
def test_what_cannot_be_is_refused(beit3, call, told):
    with pytest.raises(ValueError, match=told):
        call(beit3)


def test_a_checkpoint_without_a_part_says_which(folder, peer, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    held = {name: part.contiguous() for name, part in peer.state_dict().items() if name.startswith("beit3.")}
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(TokenizerError, match="neither tokenizer.json nor beit3.spm; pass tokenizer="):
        Beit3.from_pretrained(tmp_path)
    bare = Beit3.from_pretrained(tmp_path, tokenizer=folder / "tokenizer.json")
    with pytest.raises(ValueError, match="no head over words"):
        bare.fill(["a <mask>"])
    with pytest.raises(ValueError, match="aligned_size 0"):
        bare.compare([picture(0)], ["a"])


def test_the_published_words(tmp_path):
    """Pieces have the ids of fairseq: four words in front, the mask behind all."""
    pieces = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("a red cat sits on a chair\nthe dog runs with a ball\n" * 20)
    options = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
    pieces.SentencePieceTrainer.train(input=str(text), model_prefix=str(tmp_path / "beit3"), **options)
    (tmp_path / "beit3.model").rename(tmp_path / "beit3.spm")
    theirs = pieces.SentencePieceProcessor(model_file=str(tmp_path / "beit3.spm"))
    for place in (tmp_path, tmp_path / "beit3.spm"):
        words = read_words(place)
        assert words.encode("a red cat").tolist() == [i + 1 for i in theirs.encode("a red cat")]
        assert words.decode(words.encode("a red cat")) == "a red cat"
        assert words.model.get_vocab()[MASK] == len(theirs) + 1
    (tmp_path / "beit3.spm").write_bytes(b"nothing")
    with pytest.raises(TokenizerError, match="cannot be read as a SentencePiece model"):
        read_words(tmp_path)


def test_from_the_command_line(beit3, folder, tmp_path, capsys):
    Image.fromarray(picture(0)).save(tmp_path / "picture.png")
    call = ["generate", "--model", str(folder), "--from", "image", str(tmp_path / "picture.png"), "--to", "text"]
    assert main([*call, "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert beit3.answer([[picture(0)]], max_new_tokens=4)[0] in capsys.readouterr().out
