"""Every Triton kernel is compiled for several GPUs, which needs none: that it can be, and with what it makes do."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from omnimoe.ops.triton import is_interpreted, launch, tiles

triton = pytest.importorskip("triton")
if is_interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB a block may use, by compute capability: CUDA C++ Programming Guide, table of technical specifications."""
SPILLED = 64
"""Bytes a thread may keep in memory for want of registers: what the clamped gate's slopes need on capability 8.0."""
NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int16: "i16", torch.int32: "i32",
    torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip
KERNELS = {
    "tiles_kernel", "hidden_kernel", "multiply_kernel", "count_kernel", "place_kernel", "ends_kernel", "sum_kernel",
    "grad_hidden_kernel", "bias_share_kernel", "bank_kernel", "bias_kernel", "gather_kernel",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, request):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(request.config.rootpath / ".pytest_cache" / "triton"))


def launches(monkeypatch, dtype, mean_rows, activation=0, *, interleaved=False, width=128, hidden=256):
    """What the ops would launch on a GPU: ``(kernel, operands, options)``, one of each kind."""
    calls = {}

    def record(kernel, grid, *operands, **options):
        kind = [part is None for part in operands]
        calls[kernel.__name__, options.get("ALONG_COLUMNS"), str(kind)] = kernel, operands, options

    monkeypatch.setattr(launch, "_launch", record)
    groups = 4
    rows = groups * mean_rows

    def zeros(*shape, dtype=dtype):
        return torch.zeros(shape, dtype=dtype)

    offsets, tokens = zeros(groups, dtype=torch.int32), zeros(rows, dtype=torch.int64)
    given = (
        zeros(64, hidden), zeros(groups, 2 * width, hidden), zeros(groups, hidden, width), offsets, tokens,
        zeros(rows, dtype=torch.float32), zeros(groups, 2 * width), zeros(groups, hidden), activation, interleaved,
    )  # fmt: skip
    y, z = launch.experts_mlp(*given, True)
    launch.experts_mlp_backward(y, given[0], z, *given[1:])
    launch.route_plan(tokens, groups)
    launch.gather_rows(given[0], tokens, tokens == 0)
    return list(calls.values())


def compiled(kernel, operands, options, capability):
    """The kernel as Triton would compile it for these operands."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes, options = {}, {}, {}, dict(options)
    for place, name in enumerate(kernel.arg_names):
        varies = name in kernel.do_not_specialize
        value = operands[place] if place < len(operands) else options.pop(name)
        if place >= len(operands) or value is None or (isinstance(value, int) and value == 1 and not varies):
            signature[name], constants[(place,)] = "constexpr", value
            continue
        signature[name] = "*" + NAMES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if number % 16 == 0 and not varies:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack_bytes(made, folder: Path) -> int:
    """Bytes a thread keeps in memory for want of registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip("this Triton comes without cuobjdump")
    file = folder / "kernel.cubin"
    file.write_bytes(made.asm["cubin"])
    told = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", told).group(1))


def check(calls, capability, folder):
    for kernel, operands, options in calls:
        made = compiled(kernel, operands, options, capability)
        name = f"{kernel.__name__} {options}"
        assert made.metadata.shared <= SHARED_MEMORY[capability] * 1024, name
        assert stack_bytes(made, folder) <= SPILLED, f"{name} spills registers"
        if "PRECISION" in options and operands[0].dtype != torch.float32:
            assert _matrix_units(capability, options) in made.asm["ptx"], f"{name} multiplies without matrix units"
            assert "cp.async" in made.asm["ptx"], f"{name} does not load ahead"


def _matrix_units(capability: int, options) -> str:
    newest = {90: "wgmma", 100: "tcgen05"}.get(capability, "mma.sync")
    return newest if min(options.get("BLOCK_M", 128), options.get("BLOCK_F", 128)) >= 64 else "mma.sync"


@pytest.mark.parametrize("capability", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_every_kernel_compiles_with_matrix_units_and_hardly_spills(capability, monkeypatch, tmp_path):
    calls = launches(monkeypatch, torch.bfloat16, 256)
    assert {kernel.__name__ for kernel, _, _ in calls} == KERNELS
    check(calls, capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mean_rows", [8, 32, 64, 256])
def test_every_tile_compiles_for_every_capability(capability, dtype, mean_rows, monkeypatch, tmp_path):
    if capability not in _supported():
        pytest.skip(f"this Triton does not compile for {capability}")
    check(launches(monkeypatch, dtype, mean_rows), capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("activation", range(6))
@pytest.mark.parametrize("capability", [80, 90])
def test_every_activation_compiles(activation, capability, monkeypatch, tmp_path):
    calls = launches(monkeypatch, torch.bfloat16, 256, activation, interleaved=True)
    check([call for call in calls if "KIND" in call[2]], capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_odd_widths_compile(dtype, monkeypatch):
    """Rows that begin anywhere are loaded number by number through registers, of which there may be too few."""
    for kernel, operands, options in launches(monkeypatch, dtype, 256, interleaved=True, width=71, hidden=131):
        assert compiled(kernel, operands, options, 80).metadata.shared <= SHARED_MEMORY[80] * 1024


def test_the_tables_are_what_the_compilation_covers():
    means = {bound for bound, _ in (*tiles._HALF, *tiles._HALF_BANK, *tiles._SINGLE)} - {None}
    assert means <= {16, 32, 64}


def _supported() -> set[int]:
    """Blackwell came with Triton 3.3."""
    newer = {100, 120} if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3) else set()
    return {80, 86, 89, 90} | newer
