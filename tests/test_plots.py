"""Pictures come out whole, of the size asked for and with what was measured in them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from omnimoe.compare import Comparison
from omnimoe.plots import draw_curves, draw_grid, draw_routing, draw_shares
from omnimoe.report import Report
from omnimoe.train import History, TrainSettings

COLOUR = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def plain(name: str, size: int = 16) -> np.ndarray:
    return np.full((size, size, 3), COLOUR[name], dtype=np.uint8)


def read(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def contains(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == np.array(colour)).all(-1).sum())


def comparison(seeds: int, points: int) -> Comparison:
    steps = list(range(0, points * 10, 10))
    runs = {
        name: {
            seed: History(
                steps=steps,
                held_out={kind: [9.0 - 0.1 * i - start for i in range(points)] for kind in ("text", "all")},
                seconds=1.0,
            )
            for seed in range(seeds)
        }
        for start, name in enumerate(("dense", "mot"))
    }
    facts = {"forward_flops": dict.fromkeys(runs, 1.0), "total_params": dict.fromkeys(runs, 1)}
    return Comparison(
        names=list(runs),
        seeds=list(range(seeds)),
        settings=TrainSettings(),
        histories=runs,
        active_params=dict.fromkeys(runs, 1.0),
        **facts,
    )


@pytest.mark.parametrize(("seeds", "points"), [(1, 2), (1, 6), (3, 6)])
def test_curves_have_a_line_a_model(tmp_path, seeds, points):
    picture = read(draw_curves(comparison(seeds, points), tmp_path / "curves.png"))
    assert picture.shape[1] > 1.5 * picture.shape[0]
    for colour in ((0x3B, 0x6F, 0xB6), (0xD1, 0x66, 0x2A)):
        assert contains(picture, colour) > 50


def test_groups_of_models_have_rows_of_panels_and_what_looks_ahead_is_dotted(tmp_path):
    found = comparison(3, 6)
    found.is_causal = {"mot": False}
    whole = read(draw_curves(found, tmp_path / "one.png"))
    dotted = contains(whole, (0xD1, 0x66, 0x2A))
    assert 20 < dotted < 0.8 * contains(whole, (0x3B, 0x6F, 0xB6))
    rows = read(draw_curves(found, tmp_path / "two.png", groups={"a": ["dense", "mot"], "b": ["dense"], "c": ["none"]}))
    assert rows.shape[0] == 2 * whole.shape[0], "a group without a finished run has no panels"


def test_shares_are_points_with_intervals(tmp_path):
    found = comparison(3, 6)
    for seed, run in found.histories["mot"].items():
        run.held_out = {kind: [9.0 - (0.15 + 0.02 * seed) * i for i in range(6)] for kind in run.held_out}
    rows, kinds = found.rows(), found.modalities
    assert rows[1]["share"]["text"]["half"] > 0
    causal = read(draw_shares(rows, kinds, tmp_path / "shares.png", title="two"))
    found.is_causal = {"mot": False}
    ahead = read(draw_shares(found.rows(), kinds, tmp_path / "ahead.png"))
    blue = (0x3B, 0x6F, 0xB6)
    assert contains(causal, blue) > contains(ahead, blue) > 20, "what looks ahead is a ring, not a disc"


def test_a_grid_shows_every_picture(tmp_path):
    rows = [[plain("red"), plain("blue"), plain("red")], [plain("blue"), plain("blue")]]
    path = draw_grid(
        rows, tmp_path / "grid.png", captions=["one", "two", "x" * 200], headings=["real", "drawn"], scale=4
    )
    picture = read(path)
    each = 16 * 16 * 16
    assert contains(picture, COLOUR["red"]) > 2 * each * 0.8
    assert contains(picture, COLOUR["blue"]) > 3 * each * 0.8


def test_routing_is_a_row_a_modality_and_layer(tmp_path):
    load = np.zeros((3, 2, 4))
    load[:, 0, 0] = load[:, 1, 3] = 1.0
    path = draw_routing(load, np.array([0, 0, 1, 1, 0]), ("text", "image"), tmp_path / "routing.png", title="mot")
    assert read(path).shape[0] > 200


def test_many_copies_are_drawn_without_numbers(tmp_path):
    load = np.full((2, 2, 64), 1 / 64)
    assert read(draw_routing(load, np.zeros(8, int), ("text", "image"), tmp_path / "routing.png")).size


def test_a_report_is_one_file_and_escapes_what_it_is_given(tmp_path):
    picture = draw_grid([[plain("red")]], tmp_path / "grid.png")
    sound = tmp_path / "sound.wav"
    sound.write_bytes(b"RIFF0000WAVE")
    report = Report("<b>title</b>")
    report.heading("a < b")
    report.text("x & y", quiet=True)
    report.code("omnimoe train 'a' > log")
    report.table(["model", "<loss>"], [["mot", "1.5"]])
    report.picture(picture, 'a "grid"')
    report.sound(sound, "a clip")
    page = report.write(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>title" not in page
    for told in (
        "a &lt; b",
        "x &amp; y",
        "&lt;loss&gt;",
        "data:image/png;base64,",
        "data:audio/wav;base64,",
        "&quot;grid",
    ):
        assert told in page
    assert "http" not in page
    assert 'src="data:' in page
