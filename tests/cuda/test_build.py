"""How the CUDA library comes to be, where there is no device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from omnimoe import cli
from omnimoe.ops import BackendError, _extension, backend
from omnimoe.ops._backends import why_not_cuda

LOADS = """
import ctypes, sys, torch
from omnimoe.ops._library import SCHEMAS, register
register()
torch.ops.load_library(sys.argv[1])
told = ctypes.CDLL(sys.argv[1]).omnimoe_cuda_kernels
told.restype = ctypes.c_char_p
names = [schema.split("(")[0] for schema in SCHEMAS]
missing = [name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(f"omnimoe::{name}", "CUDA")]
print(told().decode(), missing)
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_it_is_compiled_for_ampere_and_hopper_and_loads_without_a_device(tmp_path):
    try:
        _extension.find_nvcc()
    except _extension.BuildError as error:
        pytest.skip(str(error))
    if not _extension.is_cuda_torch():
        pytest.skip("this PyTorch is built without CUDA")
    path = _extension.build(tmp_path, "cuda")
    assert [file.name for file in tmp_path.iterdir()] == [_extension.library_name("cuda")]
    done = subprocess.run([sys.executable, "-c", LOADS, str(path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "sm_80 sm_90a []", done.stderr[-2000:]


def test_without_a_device_the_reason_is_told():
    if torch.cuda.is_available():
        pytest.skip("here is one")
    reason = "there is no CUDA device" if _extension.is_cuda_torch() else "this PyTorch is built without CUDA"
    assert _extension.extension("cuda").reason == reason
    with pytest.raises(BackendError, match=f"backend 'cuda' was asked for, but {reason}"), backend("cuda"):
        raise AssertionError
    assert why_not_cuda(torch.ones(1)) == "a tensor is on cpu"


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (None, "there is no CUDA compiler (no-such-nvcc)"),
        ("echo release 11.8", "is of CUDA release 11.8; 12 is needed"),
        (
            "echo release 13.0; case $* in *-c*) echo 'x.cu: error: broken' >&2; exit 1;; esac",
            "failed: x.cu: error: broken",
        ),
    ],
    ids=["none", "old", "broken"],
)
def test_a_compiler_that_cannot_is_told_and_leaves_nothing(tmp_path, monkeypatch, capsys, script, told):
    if not _extension.is_cuda_torch():
        pytest.skip("this PyTorch is built without CUDA")
    compiler = tmp_path / "nvcc"
    if script:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("NVCC", str(compiler) if script else "no-such-nvcc")
    assert cli.main(["build", "--cuda", "--out", str(tmp_path / "made")]) == 1
    assert told in capsys.readouterr().err
    assert not list((tmp_path / "made").iterdir()) if (tmp_path / "made").exists() else True


def test_the_libraries_are_told_apart():
    assert _extension.library_name("cuda").startswith("omnimoe_cuda-")
    assert _extension.library_name() == _extension.library_name("cpu")
    assert _extension.library_name("cuda").partition("-")[2] != _extension.library_name().partition("-")[2]


def test_a_built_library_is_found_and_not_built_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMNIMOE_KERNELS", str(tmp_path))
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    assert _extension.find("cuda") is None or "built" in str(_extension.find("cuda"))
    made = tmp_path / _extension.library_name("cuda")
    made.write_bytes(b"a library")
    assert cli.main(["build", "--cuda"]) == 0
    assert Path(capsys.readouterr().out.strip()).name == made.name


def test_the_installer_builds_what_it_can(monkeypatch):
    root = Path(_extension.__file__).parents[2]
    if not (root / "setup.py").is_file():
        pytest.skip("this is no checkout")
    code = "import runpy; m = runpy.run_path('setup.py'); print(m['kinds_to_build'](m['load_builder']()))"

    def kinds(**environment: str) -> str:
        environment = {**os.environ, **environment}
        return subprocess.check_output([sys.executable, "-c", code], cwd=root, env=environment, text=True).strip()

    assert kinds(NVCC="no-such-nvcc", CXX="no-such-compiler") == "[]"
    assert "cuda" not in kinds(OMNIMOE_CUDA="0")
