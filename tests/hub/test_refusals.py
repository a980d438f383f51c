"""What the Hub refuses: every message names what was asked for and what to do, and nothing is left half done."""

from __future__ import annotations

import errno
import shutil
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download
from transformers import AutoModelForCausalLM

from omnimoe import OmniMoeForCausalLM, from_pretrained, load
from omnimoe.checkpoint import Hub, Source
from tests.hub.cache import cache, untrue
from tests.hub.server import Fault
from tests.refusals import refused, unchanged

NAME = "org/tiny"
pytestmark = pytest.mark.hazard(31)


@pytest.fixture(autouse=True)
def earlier(hub, saved) -> Path:
    """A file of another model lies in the cache already, and stays there as it is."""
    hub.add("org/earlier", saved)
    path = Path(hf_hub_download("org/earlier", "config.json"))
    hub.requests.clear()
    return path.parents[2]


@pytest.fixture
def begun(hub, earlier) -> tuple[object, ...]:
    """For a refusal while files are fetched: the rest is as it was, and what is new is what the Hub holds."""
    return (earlier, partial(untrue, hub))


def not_loaded(*fragments: str, name: str | Path | None = NAME, of: object = None, **given) -> str:
    """The message of a refusal: it holds the fragments, and the cache is as it was, or what else is handed in."""
    with refused(cache() if of is None else of, fragments[0]) as told:
        from_pretrained(name, **given)
    for fragment in fragments[1:]:
        assert fragment in str(told)
    return str(told)


def never_whole(*fragments: str, of: object) -> None:
    """Refused, and what was fetched until then is not taken for a model without network either, for the same reason."""
    not_loaded(*fragments, of=of)
    not_loaded(*fragments, local_files_only=True)


@pytest.mark.parametrize("token", [None, "good"])
def test_a_repository_that_is_not_there(hub, token):
    hub.tokens["good"] = set()
    not_loaded("there is no repository 'org/tiny'", "nor is there a folder 'org/tiny'", "`hf auth login`", token=token)


def test_an_id_that_was_called_one(hub):
    told = not_loaded("there is no repository 'org/tiny' at", "that you may see; check", name="hf-hub:org/tiny")
    assert "nor is there a folder" not in told


def test_a_private_repository_without_a_token(hub, saved):
    hub.add(NAME, saved, is_private=True)
    not_loaded("there is no repository 'org/tiny'", "if it is private, log in with `hf auth login` or pass token=")


@pytest.mark.parametrize("token", [None, "stranger"])
def test_a_gated_repository(hub, saved, begun, token):
    hub.add(NAME, saved, is_gated=True)
    hub.tokens["stranger"] = set()
    told = not_loaded("'org/tiny' is gated: ask for access at", "`hf auth login`", token=token, of=begun)
    assert f"{hub.endpoint}/org/tiny" in told
    assert not Source(name=NAME, is_folder=False, hub=Hub()).is_in_cache(), "a refusal fetched nothing"


def test_a_token_that_is_no_more(hub, saved):
    hub.add(NAME, saved)
    not_loaded("the token was refused", "Invalid credentials", "Make a new one", token="expired")


def test_a_stored_token_that_is_not_there(hub, saved):
    hub.add(NAME, saved)
    not_loaded("token=True asks for a stored token, and there is none", "`hf auth login`", token=True)


@pytest.mark.parametrize(
    ("revision", "fragment"),
    [("v11", "did you mean 'v1.1'?"), ("f" * 40, "It has main, next, v1.1")],
)
def test_a_revision_that_is_not_there(hub, saved, revision, fragment):
    repository = hub.add(NAME, saved)
    repository.branches["next"] = repository.tags["v1.1"] = repository.branches["main"]
    not_loaded(f"'org/tiny' has no revision '{revision}'", fragment, revision=revision)


def test_a_revision_of_a_folder(hub, saved):
    not_loaded("is a folder, which has no revision 'v1'", "hf-hub:", name=str(saved), revision="v1")


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    not_loaded("'org/tiny' is not in the cache", "http://127.0.0.1:9 cannot be reached", "fetch it once with network")


@pytest.mark.parametrize(
    ("status", "fragment"),
    [
        (403, "the token may not do this"),
        (429, "takes no more requests for now"),
        (503, "answered 503 for 'org/tiny'"),
        (418, "refused 'org/tiny' with 418"),
    ],
)
def test_an_answer_that_is_none(hub, saved, status, fragment):
    hub.add(NAME, saved)
    hub.faults.append(Fault("GET /api/models", status=status))
    not_loaded(fragment)


def test_a_repository_that_was_disabled(hub, saved):
    hub.add(NAME, saved)
    headers = {"X-Error-Message": "Access to this resource is disabled."}
    hub.faults.append(Fault("GET /api/models", status=403, headers=headers))
    not_loaded("'org/tiny' was disabled by the Hub")


def test_a_download_that_breaks_off(hub, saved, model, begun):
    hub.add(NAME, saved)
    hub.faults.append(Fault("GET .*model.safetensors", cut=1000))
    not_loaded("the transfer of 'org/tiny' broke off: ", "Call again", of=begun)
    hub.faults.clear()
    assert from_pretrained(NAME, verify=True).config.modality_names == model.config.modality_names


@pytest.mark.parametrize(
    ("error", "fragment"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk of the cache is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be kept in the cache"),
    ],
)
def test_a_cache_that_cannot_be_written(hub, saved, begun, monkeypatch, error, fragment):
    hub.add(NAME, saved)

    def fail(*args, **given):
        raise error

    monkeypatch.setattr("huggingface_hub.file_download._chmod_and_move", fail)
    not_loaded(fragment, "cache_dir=", of=begun)


def test_a_cache_that_is_a_file(hub, saved, tmp_path):
    hub.add(NAME, saved)
    (tmp_path / "file").write_text("no folder")
    held = (cache(), tmp_path / "file")
    not_loaded("cannot be kept in the cache", "pass another folder as cache_dir=", cache_dir=held[1], of=held)


def test_a_download_goes_on_where_it_broke_off(hub, saved):
    hub.add(NAME, saved)
    hub.faults.append(Fault("GET .*model.safetensors", cut=1000, times=1))
    with unchanged(saved):
        from_pretrained(NAME, verify=True)
    assert len([line for line in hub.requests if line.startswith("GET") and "model.safetensors" in line]) == 2


@pytest.mark.parametrize(
    ("removed", "fragments"),
    [
        ("config.json", ("has no config.json",)),
        ("model.safetensors", ("has no model.safetensors at revision 'main'", "pickles, which are not read")),
    ],
)
def test_a_repository_with_a_part_alone(hub, saved, begun, tmp_path, removed, fragments):
    folder = shutil.copytree(saved, tmp_path / "upload")
    (folder / removed).unlink()
    hub.add(NAME, folder)
    never_whole(*fragments, of=begun)


def test_a_shard_that_was_not_uploaded(hub, sharded, begun, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "upload")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    hub.add(NAME, folder)
    never_whole(f"'org/tiny' has no {shard.name} at revision 'main'", of=begun)


def test_a_subfolder_that_is_not_there(hub, saved, begun):
    hub.add(NAME, saved)
    not_loaded("has no folder 'step-1'", subfolder="step-1", of=begun)


@pytest.mark.parametrize("subfolder", ["../other", "/etc", "a//b", ".", "a/*"])
def test_a_subfolder_outside(hub, saved, subfolder):
    not_loaded("must be a path inside", subfolder=subfolder)
    not_loaded("must be a path inside", name=str(saved), subfolder=subfolder)


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("./runs/model", "neither an existing folder nor an id"),
        ("runs/a/b", "neither an existing folder nor an id"),
        ("hf-hub:tiny", "nor an id on the Hub (org/name)"),
        ("hf-hub:org/a--b", "is no id of the Hub"),
        ("local-dir:org/tiny", "there is no folder 'org/tiny'"),
        (Path("org/tiny"), "there is no folder 'org/tiny'"),
        ("mot_37", "did you mean 'mot_37m'"),
        ("mot_37m", "call load('mot_37m')"),
        ("", "'' names no model; pass a folder or an id on the Hub"),
        (" ", "' ' names no model"),
        (None, "None names no model"),
        (3, "3 names no model"),
        ("hf-hub:", "'hf-hub:' names no model"),
        ("local-dir:", "'local-dir:' names no model"),
        ("https://huggingface.co/org/tiny/tree/main", "it is an address of the web, so pass the id, 'org/tiny'"),
        ("org/tiny@v1", "pass 'org/tiny' with revision='v1'"),
        (__file__, "it is a file, so pass its folder"),
    ],
)
def test_a_name_that_is_none(hub, saved, name, fragment, monkeypatch):
    monkeypatch.chdir(saved)  # what names nothing is not the current folder
    not_loaded(fragment, name=name)
    if fragment.endswith("names no model") or name == "":
        for load_it in (OmniMoeForCausalLM.from_pretrained, lambda name: load(name, pretrained=True), load):
            with refused((cache(), saved), "names no model"):
                load_it(name)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("given", "fragment"),
    [
        ({"revision": ""}, "revision must be a branch, a tag or a commit, got ''; leave it out for the main branch"),
        ({"revision": 3}, "revision must be a branch, a tag or a commit, got 3"),
        ({"token": ""}, "token must be a token of the Hub, and is empty or no text; leave it out"),
        ({"token": 7}, "token must be a token of the Hub"),
        ({"cache_dir": ""}, "cache_dir must be a folder, got ''"),
    ],
    ids=str,
)
def test_an_argument_that_means_nothing(hub, saved, given, fragment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.add(NAME, saved)
    not_loaded(fragment, **given)
    with refused((cache(), tmp_path), fragment):
        OmniMoeForCausalLM.from_pretrained(NAME, **given)
    assert hub.requests == []
    assert list(tmp_path.glob("models--*")) == []


def test_the_auto_classes_refuse_as_transformers_does(hub, saved, begun):
    """They look at the config before our class is known, so it is an OSError of theirs, as for any model."""
    hub.add("org/gated", saved, is_gated=True)
    for name, fragment in (("org/gated", "gated repo"), (NAME, "is not a valid model identifier")):
        with refused(begun, fragment, OSError):
            AutoModelForCausalLM.from_pretrained(name)
