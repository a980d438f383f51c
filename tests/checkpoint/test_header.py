"""Malformed safetensors files: one kind of error for all of them, and more of them than the library refuses."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from omnimoe.checkpoint import CheckpointError
from omnimoe.checkpoint.header import BITS, HEADER_LIMIT, OUTLINE, Entry, read_header
from tests.checkpoint.files import WEIGHTS, load, safetensors
from tests.children import capped
from tests.hazard_rows import EXAMPLES
from tests.refusals import refused

FLOAT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SECOND = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
EIGHT = b"\0" * 8
MEMORY = 256 << 20
"""Bytes that a child may take to refuse a file."""


def one(**changes) -> dict:
    return {"a": FLOAT | changes}


def named(name: str) -> bytes:
    return safetensors({name: FLOAT}, EIGHT)


MALFORMED = {
    # the frame
    "empty": (b"", "has 0 bytes"),
    "seven_bytes": (b"\1\0\0\0\0\0\0", "has 7 bytes, and a safetensors file at least 8"),
    "length_alone": ((2).to_bytes(8, "little"), "a header of 2 bytes, more than the file itself"),
    "length_of_zero": (bytes(8), "all zeros"),
    "zeros": (bytes(4096), "all zeros, as a copy that was broken off leaves"),
    "length_past_the_end": (safetensors(one(), EIGHT, length=10_000), "more than the file itself"),
    "length_of_all_bits": (b"\xff" * 8 + b"{}", "more than the file itself"),
    "header_cut_off": (safetensors(one(), EIGHT)[:30], "more than the file itself"),
    "length_too_small": (safetensors(one(), EIGHT, length=20), "no JSON of this format"),
    "length_too_large": (safetensors(one(), EIGHT + b"}", length=len(json.dumps(one())) + 9), "no JSON of this format"),
    # the text
    "spaces_first": (safetensors(b" " * 8 + json.dumps(one()).encode(), EIGHT), "not with '{'"),
    "byte_order_mark": (safetensors(b"\xef\xbb\xbf" + json.dumps(one()).encode(), EIGHT), "not with '{'"),
    "list": (safetensors([one()], EIGHT), "not with '{'"),
    "not_utf8": (safetensors(b'{"\xff\xfe": 1}'), "no JSON of this format"),
    "not_json": (safetensors(b"{model}"), "no JSON of this format"),
    "newline_after": (safetensors(json.dumps(one()).encode() + b"\n", EIGHT), "only spaces may stand"),
    "two_objects": (safetensors(json.dumps(one()).encode() * 2, EIGHT), "no JSON of this format"),
    "nested_deeply": (safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "no JSON of this format"),
    "number_of_many_digits": (safetensors(b'{"a":' + b"9" * 10_000 + b"}"), "no JSON of this format"),
    "not_a_number": (safetensors(json.dumps(one(shape=[float("nan")])).encode(), EIGHT), "NaN is no number of JSON"),
    "key_twice": (
        safetensors(f'{{"a": {json.dumps(FLOAT)}, "a": {json.dumps(FLOAT)}}}'.encode(), EIGHT),
        "the key 'a' stands there twice",
    ),
    "field_twice": (
        safetensors(b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}', EIGHT),
        "the key 'dtype' stands there twice",
    ),
    # what it says
    "no_tensors": (safetensors({}), "holds no tensors"),
    "metadata_alone": (safetensors({"__metadata__": {"format": "pt"}}), "holds no tensors"),
    "metadata_with_a_number": (safetensors({"__metadata__": {"step": 1}} | one(), EIGHT), "no texts by name"),
    "metadata_in_a_list": (safetensors({"__metadata__": ["pt"]} | one(), EIGHT), "no texts by name"),
    "name_empty": (named(""), "a tensor without a name"),
    "name_with_nul": (named("a\0b"), "no name of a weight"),
    "name_of_a_path": (named("../../etc/passwd"), "no name of a weight"),
    "name_with_backslash": (named("a\\b"), "no name of a weight"),
    "name_with_newline": (named("a\nb"), "no name of a weight"),
    "name_of_half_a_character": (safetensors(b'{"\\ud800": ' + json.dumps(FLOAT).encode() + b"}", EIGHT), "no name"),
    "name_too_long": (named("a" * 600), "no name of a weight"),
    "entry_of_a_number": (safetensors({"a": 1}), "not by exactly data_offsets, dtype, shape"),
    "field_missing": (safetensors({"a": {"dtype": "F32", "shape": [2]}}, EIGHT), "not by exactly"),
    "field_too_many": (safetensors(one(note="x"), EIGHT), "not by exactly"),
    "dtype_unknown": (safetensors(one(dtype="F31"), EIGHT), "the dtype 'F31', which is not one of"),
    "dtype_of_a_number": (safetensors(one(dtype=32), EIGHT), "the dtype 32"),
    "dtype_torch_has_not": (safetensors(one(dtype="F6_E2M3", shape=[4], data_offsets=[0, 3]), b"123"), "F6_E2M3"),
    "shape_negative": (safetensors(one(shape=[-2]), EIGHT), "the shape [-2]"),
    "shape_of_fractions": (safetensors(one(shape=[2.0]), EIGHT), "the shape [2.0]"),
    "shape_of_truth": (safetensors(one(shape=[True, 2]), EIGHT), "the shape [True, 2]"),
    "shape_of_text": (safetensors(one(shape="2"), EIGHT), "the shape '2'"),
    "shape_past_64_bits": (safetensors(one(shape=[2**64]), EIGHT), "the shape [18446744073709551616]"),
    "shape_whose_product_overflows": (safetensors(one(shape=[2**40] * 3), EIGHT), "8 bytes, but F32 of shape"),
    "shape_of_many_axes": (safetensors(one(shape=[1] * 16 + [2]), EIGHT), "the shape [1, 1"),
    "too_few_bytes_for_the_shape": (safetensors(one(shape=[3]), EIGHT), "takes 96 bits"),
    "half_a_byte": (safetensors(one(dtype="F4", shape=[3], data_offsets=[0, 1]), b"1"), "takes 12 bits"),
    "offsets_of_three": (safetensors(one(data_offsets=[0, 4, 8]), EIGHT), "not a begin and an end"),
    "offsets_backwards": (safetensors(one(data_offsets=[8, 0]), EIGHT), "not a begin and an end"),
    "offsets_negative": (safetensors(one(data_offsets=[-8, 0]), EIGHT), "not a begin and an end"),
    "offsets_past_64_bits": (safetensors(one(data_offsets=[2**64, 2**64 + 8]), EIGHT), "not a begin and an end"),
    "overlap": (safetensors({"a": FLOAT, "b": FLOAT | {"data_offsets": [4, 12]}}, EIGHT * 2), "an overlap at 'b'"),
    "same_bytes": (safetensors({"a": FLOAT, "b": FLOAT}, EIGHT), "an overlap at 'b'"),
    "hole": (safetensors({"a": FLOAT, "b": FLOAT | {"data_offsets": [12, 20]}}, EIGHT * 3), "a hole before 'b'"),
    "hole_at_the_start": (safetensors({"b": SECOND}, EIGHT * 2), "a hole before 'b'"),
    "bytes_missing": (safetensors(one(), EIGHT[1:]), "is cut off: 8 bytes of tensors belong there, and 7 are there"),
    "bytes_left": (safetensors(one(), EIGHT + b"x"), "has 1 bytes after its last tensor"),
}


@pytest.mark.hazard(1)
@pytest.mark.parametrize("name", MALFORMED)
@capped(MEMORY)
def test_a_malformed_file_is_refused(saved, name):
    content, fragment = MALFORMED[name]
    (saved / WEIGHTS).write_bytes(content)
    with refused(saved, fragment):
        load(saved)


@pytest.mark.hazard(1)
@capped(MEMORY)
def test_a_header_larger_than_any(saved):
    """As much as the limit and one byte; the file has a hole in it and takes no space."""
    with (saved / WEIGHTS).open("wb") as file:
        file.write((HEADER_LIMIT + 1).to_bytes(8, "little") + b"{")
        os.truncate(file.fileno(), HEADER_LIMIT + 100)
    with refused(saved, "more than 33,554,432 bytes"):
        load(saved)


LARGE = {
    "lists": (lambda: b'{"a":[' + b"[]," * 10_000_000 + b"[]]}", "not by exactly"),
    "axes": (
        lambda: b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[' + b"1," * 10_000_000 + b"1]}}",
        "the shape [1, 1",
    ),
    "text": (lambda: b'{"__metadata__":{"a":"' + b"x" * (30 << 20) + b'"},"b":1}', "not by exactly"),
}
"""Of headers that are read, those that take most."""


@pytest.mark.slow
@pytest.mark.hazard(1)
@pytest.mark.parametrize("kind", LARGE)
@capped(1536 << 20)
def test_a_header_that_grows_as_it_is_read(saved, kind):
    header, fragment = LARGE[kind]
    (saved / WEIGHTS).write_bytes(safetensors(header()))
    with refused(saved, fragment) as told:
        load(saved)
    assert len(str(told)) < 1000


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (one(), EIGHT),
        (one(shape=[], data_offsets=[0, 4]), b"1234"),
        (one(shape=[0, 3], data_offsets=[0, 0]), b""),
        ({"b": SECOND, "a": FLOAT}, EIGHT * 2),
        ({"__metadata__": {"format": "pt"}} | one(), EIGHT),
        (json.dumps(one()).encode() + b"   ", EIGHT),
        (one(dtype="F4", shape=[4], data_offsets=[0, 2]), b"12"),
    ],
)
def test_what_is_unusual_and_legal(tmp_path, header, data):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors(header, data))
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(read_header(path))


def test_a_header_without_numbers_is_one_only_where_it_says_so(tmp_path):
    path, marked = tmp_path / "a.safetensors", {"__metadata__": OUTLINE} | one()
    path.write_bytes(safetensors(marked))
    assert read_header(path, outline=True) == {"a": Entry("F32", (2,), 8)}
    for content, asked, told in [
        (safetensors(marked), False, "an outline, .* 1 tensors without their numbers; load it with device='meta'"),
        (safetensors(one()), True, "is cut off: 8 bytes of tensors belong there, and 0 are there"),
        (safetensors(marked, EIGHT[:4]), True, "is cut off: 8 bytes of tensors belong there, and 4 are there"),
        (safetensors(marked | {"b": FLOAT}), True, "an overlap at 'b'"),
    ]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=told):
            read_header(path, outline=asked)


def test_what_a_header_says(saved, model):
    entries = read_header(saved / WEIGHTS)
    for name, tensor in model.state_dict().items():
        assert entries[name] == Entry("F32", tuple(tensor.shape), tensor.nbytes)


def test_every_dtype_is_one_that_torch_reads(tmp_path):
    for dtype, bits in BITS.items():
        path = tmp_path / f"{dtype}.safetensors"
        path.write_bytes(safetensors(one(dtype=dtype, shape=[8], data_offsets=[0, bits]), bytes(bits)))
        with safe_open(path, "pt") as file:
            assert isinstance(file.get_tensor("a"), torch.Tensor)
        assert read_header(path)["a"].size == bits


PLAIN = st.none() | st.booleans() | st.integers(-2, 2**65) | st.text(max_size=3) | st.sampled_from(sorted(BITS))
SHAPES = st.lists(st.integers(0, 4), max_size=3)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F6_E2M3", "X"]) | PLAIN,
        "shape": SHAPES | PLAIN | st.lists(PLAIN, max_size=2),
        "data_offsets": st.lists(st.integers(0, 32), min_size=2, max_size=2) | PLAIN,
    },
    optional={"note": PLAIN},
)
NAMES = st.sampled_from(["a", "b", "model.norm.weight", "__metadata__", "", "../a"]) | st.text(max_size=3)


DONE: list[int] = []


@settings(max_examples=EXAMPLES[1])
@given(
    header=st.dictionaries(NAMES, ENTRIES | PLAIN, max_size=3) | st.binary(max_size=40),
    data=st.binary(max_size=32),
    length=st.none() | st.integers(0, 200),
    fits=st.booleans(),
)
def check_any(path, header, data, length, fits):
    """What passes here passes there, as the same tensors; no other error than ours comes out."""
    DONE.append(1)
    if fits and isinstance(header, dict):  # most would fail at their offsets: lay some out one after the other
        place = 0
        for entry in header.values():
            shape = entry.get("shape") if isinstance(entry, dict) else None
            bits = BITS.get(str(entry.get("dtype"))) if isinstance(entry, dict) else None
            if bits and isinstance(shape, list) and all(type(count) is int and 0 <= count < 9 for count in shape):
                size = bits * int(torch.tensor(shape, dtype=torch.int64).prod()) // 8
                entry["data_offsets"] = [place, place + size]
                place += size
        data = bytes(place)
        length = None
    path.write_bytes(safetensors(header, data, length=length))
    with refused(path, f"{path} ", is_sure=False) as told:
        entries = read_header(path)
    if told.value:
        return
    # a file that the library refuses raises here
    with safe_open(path, "pt") as file:
        read = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dict
        assert {name: (held.get_dtype(), tuple(held.get_shape())) for name, held in read.items()} == {
            name: (entry.dtype, entry.shape) for name, entry in entries.items()
        }


@pytest.mark.hazard(1)
@capped(MEMORY)
def test_any_header_is_refused_or_read_like_the_library_reads_it(tmp_path):
    check_any(tmp_path / "a.safetensors")
    assert len(DONE) >= EXAMPLES[1]
