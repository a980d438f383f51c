"""What all pipelines have in common when they are opened."""

from __future__ import annotations

import pytest

from omnimoe import CheckpointError
from omnimoe.pipelines import PIPELINES, Pipeline, find_pipeline
from omnimoe.pipelines.base import open_published

FAMILIES = sorted(PIPELINES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_opened_in_the_same_way(family, tmp_path):
    kind = PIPELINES.get(family)
    with pytest.raises(CheckpointError, match="is a folder, which has no revision 'v1'"):
        kind.from_pretrained(tmp_path, revision="v1", dtype="float32", device="cpu")
    with pytest.raises(CheckpointError, match="neither an existing folder nor an id"):
        kind.from_pretrained("mot_nano", token=False)
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        kind.from_pretrained("nobody/nothing", local_files_only=True)
    with pytest.raises(TypeError, match="has no option 'devise'; it has dtype, device, revision"):
        kind.from_pretrained(tmp_path, devise="cpu")


def test_nothing_is_loaded_until_it_is_asked_for(tmp_path):
    (tmp_path / "words.txt").write_text("a")
    folder, load = open_published(tmp_path, ("*.txt",))
    assert (folder / "words.txt").read_text() == "a"
    with pytest.raises(CheckpointError):
        load()


def test_what_is_of_no_family_has_no_pipeline():
    assert find_pipeline("mot_nano") is None
    assert find_pipeline("omni_nano") is None
    assert find_pipeline("no_such_model") is None
    with pytest.raises(NotImplementedError, match="Pipeline does not define from_pretrained"):
        Pipeline.from_pretrained("anything")
