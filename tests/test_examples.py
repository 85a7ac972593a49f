"""The examples of docs/examples run as they stand, in loops of their own."""

import functools
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "examples"


@pytest.fixture(scope="module")
def run():
    """Return a function that runs an example and returns its names."""
    return functools.cache(lambda name: runpy.run_path(str(FOLDER / f"{name}.py")))


def test_every_example_is_short_and_stands_on_the_page():
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    files = sorted(FOLDER.glob("*.py"))
    assert {path.stem for path in files} == {
        "losses", "thresholds", "transforms", "filters", "objective", "ignite_loop"
    }  # fmt: skip
    for path in files:
        assert f"{{literalinclude}} examples/{path.name}" in page
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, path.name


@pytest.mark.parametrize("name", ["losses", "thresholds", "objective", "ignite_loop"])
def test_an_example_learns(name, run):
    first, *_, last = run(name)["history"]
    key = "loss" if name == "thresholds" else "supervised"
    assert last[key] < 0.7 * first[key]


def test_the_terms_of_the_objective_all_count_in_the_end(run):
    found = run("objective")
    assert set(found["history"][-1]) == {"supervised", "pseudo_label", "entropy", "consistency"}
    assert min(found["history"][-1].values()) > 0
    pairs = zip(found["network"].parameters(), found["teacher"].parameters(), strict=True)
    assert any(not torch.equal(own, mean) for own, mean in pairs)


def test_the_teacher_follows_and_is_measured_in_the_loop_of_ignite(run):
    found = run("ignite_loop")
    assert len(found["history"]) == 20
    pairs = zip(found["network"].parameters(), found["teacher"].parameters(), strict=True)
    assert all(0 < (own - mean).abs().max() < 0.5 for own, mean in pairs)
    assert found["dice"].shape == (4,)
    assert found["dice"][0] > 0.8, "the background"


def test_the_views_of_the_transforms_differ_and_their_voxels_correspond(run):
    found = run("transforms")
    weak, strong, third = (found["batch"][key] for key in ("weak", "strong", "randaugment"))
    assert weak.shape == strong.shape == third.shape == (4, 1, 24, 24, 24)
    assert not torch.equal(weak, strong)
    assert not torch.equal(weak, third)
    boxes = found["boxes"]
    assert boxes.any(dim=(1, 2, 3, 4)).all()
    other = found["batch"]["label"].roll(1, 0)
    assert torch.equal(found["mixed_label"][boxes], other[boxes])
    assert torch.equal(found["mixed"][boxes], strong.roll(1, 0)[boxes])
    label = (found["cases"][0]["label"] > 0).astype("float32")
    cut = found["cut"]({"image": label, "label": label})
    assert (cut["weak"].round() == cut["label"]).float().mean() > 0.97


def test_the_filters_keep_the_certain_voxels_of_one_piece(run):
    found = run("filters")
    assert 0 < found["certain"].float().mean() < 1
    assert (found["information"] <= found["entropy"] + 1e-6).all()
    assert 0 < found["confidence"] < 1
    assert found["cleaned"].sum(0) == pytest.approx(np.ones((32, 32, 32)), abs=1e-5)
    for index in found["expected"].single:
        mask = found["cleaned"].argmax(0) == index
        assert ndimage.label(mask, np.ones((3, 3, 3)))[1] <= 1
