"""Fetching: once is enough, another file than the pinned one is refused, a missing client is named."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from omnimoe.data import sources
from omnimoe.data.sources import Source, SourceError, cache_folder, fetch


def a_source(**changes: object) -> Source:
    fields = {"name": "n", "kind": "npm", "package": "@scope/pack", "version": "1:2.0", "license": "MIT", "credit": "c"}
    return Source(**{**fields, "homepage": "h", "used": "u", **changes})  # type: ignore[arg-type]


def serve(monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes]) -> tuple[str, list[list[str]]]:
    """Stands in for the registry's client: writes an archive where the client would. Gives its digest and the calls."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    calls: list[list[str]] = []

    def run(source: Source, command: list[str], work: Path) -> None:
        calls.append(command)
        (work / "pack.tgz").write_bytes(buffer.getvalue())

    monkeypatch.setattr(sources, "_run", run)
    return hashlib.sha256(buffer.getvalue()).hexdigest(), calls


def test_fetches_once(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    digest, calls = serve(monkeypatch, {"package/a.json": b"{}"})
    source = a_source(sha256=digest)
    folder = fetch(source)
    assert (folder / "package" / "a.json").read_bytes() == b"{}"
    assert folder.is_relative_to(cache_dir)
    assert fetch(source) == folder
    assert calls == [["npm", "pack", "@scope/pack@1:2.0", "--silent"]]


def test_another_file_than_pinned_is_refused(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    serve(monkeypatch, {"package/a.json": b"{}"})
    with pytest.raises(SourceError, match="pinned is 00"):
        fetch(a_source(sha256="00"))
    assert not [p for p in cache_folder().iterdir() if not p.name.startswith(".")]


def test_an_archive_that_climbs_out_is_refused(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    serve(monkeypatch, {"../../evil": b"x"})
    with pytest.raises(tarfile.TarError):
        fetch(a_source())


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    monkeypatch.setenv("PATH", str(cache_dir))
    with pytest.raises(SourceError, match=r"@scope/pack comes as a npm package and needs 'npm'.*Node\.js"):
        fetch(a_source())
    with pytest.raises(SourceError, match="needs 'dpkg-deb'.*Debian"):
        fetch(a_source(kind="deb"))


def test_a_failing_client_is_reported(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    tool = cache_dir / "npm"
    tool.write_text("#!/bin/sh\necho no such package >&2\nexit 7\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(cache_dir), prepend=":")
    with pytest.raises(SourceError, match=r"ended with 7: no such package; check that the registry"):
        fetch(a_source())


def test_the_cache_follows_the_environment(cache_dir: Path, tmp_path: Path) -> None:
    assert cache_folder() == cache_dir / "sources"
    assert cache_folder(tmp_path / "own") == tmp_path / "own" / "sources"
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="set OMNIMOE_CACHE"):
        cache_folder(tmp_path / "file")
