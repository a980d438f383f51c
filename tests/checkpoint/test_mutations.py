"""A checkpoint whose bytes were changed loads as what it says then, or is refused: no other error, crash or memory."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omnimoe import from_pretrained
from omnimoe.checkpoint import check_folder
from omnimoe.model import OmniMoeForCausalLM
from tests.checkpoint.files import INDEX, WEIGHTS, load, same_weights
from tests.children import capped, in_child
from tests.hazard_rows import EXAMPLES
from tests.refusals import refused

BLOCKS = 10
EACH = EXAMPLES[2] // BLOCKS


def mutated(content: bytes, chance: random.Random, *, header: int | None = None) -> bytes:
    """One of what happens to files: a bit, a byte, a run, a cut, an insertion, a piece twice; mostly in the header."""
    header = 8 + int.from_bytes(content[:8], "little") if header is None else header
    end = len(content) if chance.random() < 0.2 else header
    place = chance.randrange(8 if chance.random() < 0.2 else end)
    kind = chance.randrange(6)
    if kind == 0:
        return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]
    if kind == 1:
        return content[:place] + bytes([chance.randrange(256)]) + content[place + 1 :]
    length = chance.randrange(1, 40)
    if kind == 2:
        return content[:place] + chance.randbytes(length) + content[place + length :]
    if kind == 3:
        return content[:place] + content[place + length :]
    if kind == 4:
        return content[:place] + chance.randbytes(length) + content[place:]
    return content[: place + length] + content[place:]


def outcomes(
    folder: Path,
    name: str,
    changes: Iterable[bytes],
    check: Callable[[OmniMoeForCausalLM], None],
    by: Callable[[Path], OmniMoeForCausalLM] = load,
) -> Counter[str]:
    """How a model fares whose file is changed: each is loaded whole, in a child with little memory.

    A refusal names the folder and changes nothing; what loads is held to ``check``.
    """

    def fare() -> Counter[str]:
        found: Counter[str] = Counter()
        for changed in changes:
            (folder / name).write_bytes(changed)
            with refused(folder, str(folder), is_sure=False) as told:
                check(by(folder))
            found["refused" if told.value else "loaded"] += 1
        return found

    return Counter(in_child(fare, memory=256 << 20))


def raw(weights: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """Weights by their bits: NaN is not equal to itself."""
    return {
        name: (held.dtype, held.shape, held.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, held in weights.items()
    }


@pytest.mark.hazard(2)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_changed_bytes(saved, model, block):
    """Names, shapes and dtypes are the model's or it is refused; the bits of what loads are those of the file."""
    content = (saved / WEIGHTS).read_bytes()
    changes = [mutated(content, random.Random(seed)) for seed in range(block * EACH, (block + 1) * EACH)]

    def check(loaded: OmniMoeForCausalLM) -> None:
        found = raw(loaded.state_dict())
        assert found == raw(load_file(saved / WEIGHTS))
        assert {name: held[:2] for name, held in found.items()} == {
            name: held[:2] for name, held in raw(model.state_dict()).items()
        }

    found = outcomes(saved, WEIGHTS, changes, check)
    assert found.total() == EACH
    assert found["refused"] > EACH // 2
    assert found["loaded"] > 0


def test_changed_bits_of_the_tensors_alone(saved, model):
    """Unasked nothing can tell, and one bit of one weight differs; the manifest tells."""
    content = (saved / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    whole = raw(model.state_dict())
    for seed in range(12):
        place = random.Random(seed).randrange(start, len(content))
        changed = content[:place] + bytes([content[place] ^ 1 << seed % 8]) + content[place + 1 :]
        (saved / WEIGHTS).write_bytes(changed)
        found = raw(load(saved).state_dict())
        (other,) = (name for name in whole if whole[name] != found[name])
        assert sum(one != two for one, two in zip(whole[other][2], found[other][2], strict=True)) == 1
        with refused(saved, "is not the file that was saved"):
            load(saved, verify=True)


@pytest.mark.parametrize("seed", range(12))
@capped(256 << 20)
def test_a_changed_header_that_can_be_read_is_no_other_model(saved, model, seed):
    """A name, a shape or a dtype that changed is found, whatever the bytes still say."""
    content = (saved / WEIGHTS).read_bytes()
    chance = random.Random(seed)
    length = int.from_bytes(content[:8], "little")
    while True:
        place = chance.randrange(8, 8 + length)
        changed = content[:place] + bytes([chance.choice(b"abcfgiopux12468")]) + content[place + 1 :]
        if changed == content:
            continue
        (saved / WEIGHTS).write_bytes(changed)
        with refused(saved, str(saved), is_sure=False) as told:
            check_folder(saved)
        if not told.value:
            break
    with refused(saved, str(saved), is_sure=False) as told:
        loaded = load(saved)
    # what is left are the notes of the header, which no model reads
    assert told.value or same_weights(loaded, model)


def rewritten(content: bytes, chance: random.Random) -> bytes:
    """One to three of what happens to JSON: another byte, more digits, a cut, another value, a piece twice."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        place, kind = chance.randrange(len(content)), chance.randrange(5)
        if kind == 0:
            content = content[:place] + bytes([chance.randrange(256)]) + content[place + 1 :]
        elif kind == 1:
            content = content[:place] + b"9" * chance.choice((1, 2, 9, 30)) + content[place:]
        elif kind == 2:
            content = content[: max(place, 1)] + content[place + chance.randrange(1, 30) :]
        elif kind == 3:
            values = [*re.finditer(rb':\s*("[^"]*"|-?[\d.]+|true|false|null|\[[^\]\[]*\])', content)]
            if values:
                found = chance.choice(values)
                content = content[: found.start(1)] + chance.choice(VALUES) + content[found.end(1) :]
        else:
            content = content[: place + chance.randrange(1, 40)] + content[place:]
    return content


VALUES = (b"null", b"true", b"-1", b"0", b"3", b"1.5", b"1e400", b"NaN", b"99999999999", b"1" + b"0" * 30)
VALUES += (b'""', b'"x"', b'"../x"', b"[]", b"[1, [2]]", b"{}", b'{"type": "moe"}')


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_changed_json(sharded, model, name):
    """Whatever it declares, the weights are those that were saved, in the shapes they have, or it is refused."""
    content = (sharded / name).read_bytes()
    changes = [rewritten(content, random.Random(seed)) for seed in range(60)]

    def check(loaded: OmniMoeForCausalLM) -> None:
        # a file may say in which of the floating dtypes they are wanted
        held, wanted = loaded.state_dict(), model.state_dict()
        assert held.keys() == wanted.keys()
        assert all(torch.equal(held[key], wanted[key].to(held[key].dtype)) for key in wanted)

    found = outcomes(sharded, name, changes, check, by=from_pretrained)
    assert found.total() == len(changes)
    assert found["refused"] > len(changes) // 4
