"""Islands: only those of classes that are one piece in every labeled case are taken out."""

import threading

import numpy as np
import pytest

from medssl.config import FilterSection
from medssl.data.cache import CachedCase
from medssl.data.pseudo_labels import write_pseudo_label
from medssl.pseudo import label
from medssl.pseudo.gates import Expectation, expect_from, find_islands


def to_probs(classes, num_classes=3):
    return np.moveaxis(np.eye(num_classes, dtype=np.float32)[classes], -1, 0)


def clean(classes, single):
    cleaned = classes.copy()
    for box, islands in find_islands(classes, frozenset(single)):
        cleaned[box][islands] = 0
    return cleaned


def one_piece():
    label = np.zeros((12, 12, 12), np.uint8)
    label[1:5, 1:5, 1:5] = 1
    label[6:9, 1:4, 1:4] = 2
    return label


def test_an_island_becomes_background_and_the_largest_piece_stays():
    classes = one_piece()
    classes[10, 10, 10] = 1
    assert np.array_equal(clean(classes, {1, 2}), one_piece())
    assert not list(find_islands(classes, frozenset()))


def test_pieces_of_a_class_that_has_several_stay():
    classes = one_piece()
    classes[10, 10, 10] = 1
    assert np.array_equal(clean(classes, {2}), classes)


def test_pieces_that_touch_at_a_corner_are_one():
    classes = np.zeros((6, 6, 6), np.uint8)
    classes[1, 1, 1] = classes[2, 2, 2] = 1
    assert np.array_equal(clean(classes, {1}), classes)


def test_a_class_in_two_pieces_in_one_labeled_case_is_not_single():
    split = one_piece()
    split[9:12, 9:12, 9:12] = 2
    assert expect_from([one_piece()], 3).single == {1, 2}
    assert expect_from([one_piece(), split], 3).single == {1}


def test_a_class_that_neither_pseudo_label_has_is_not_an_agreement(tmp_path):
    organ = np.zeros((4, 4, 4), int)
    organ[:2] = 1
    moved = np.roll(organ, 2, 0)
    part = (np.s_[:, :, :], to_probs(moved), np.zeros(organ.shape, np.float32))
    write_pseudo_label(tmp_path / "before", (3, 4, 4, 4), [part], "teacher")
    names = {0: "background", 1: "organ", 2: "lesion"}
    assert label._compare(organ, tmp_path / "before", names) == {
        "organ": 0.0,
        "lesion": None,
    }


@pytest.fixture
def make_cached(tmp_path):
    def make(name):
        folder = tmp_path / name
        folder.mkdir()
        np.save(folder / "image.npy", np.zeros((1, 12, 12, 12), np.float16))
        place = ((12, 12, 12), np.eye(4))
        return CachedCase(name, folder, *place, *place, ((0.0, 1.0, 2.0),), None)

    return make


@pytest.mark.parametrize("has_room", [True, False])
def test_a_mask_is_written_beside_the_next_case_where_there_is_room(
    tmp_path, make_cached, monkeypatch, has_room
):
    events: list[tuple[str, str]] = []
    begun = {name: threading.Event() for name in "abc"}

    def predict(case):
        events.append(("predict", case.case_id))
        begun[case.case_id].set()
        part = (np.s_[:, :, :], to_probs(one_piece()), np.zeros(case.shape, np.float32))
        return label.RawPseudoLabel([part], lambda _: None)

    def write_mask(folder, case, *_):
        following = {"a": "b", "b": "c"}.get(case.case_id)
        if has_room and following:
            assert begun[following].wait(20), "the next case waits for this mask"
        events.append(("write", case.case_id))

    monkeypatch.setattr(label, "has_room", lambda _: has_room)
    monkeypatch.setattr(label, "_write_mask", write_mask)
    names = {0: "background", 1: "organ", 2: "lesion"}
    cases = [make_cached(name) for name in "abc"]
    expected = (Expectation({1: 1.0}, {1: 0.2}), names, (0, 1, 2), FilterSection())
    reviews = label.label_cases(
        cases, predict, tmp_path / "round_0", None, "teacher", *expected, lambda: False
    )
    assert [review.case_id for review in reviews] == ["a", "b", "c"]
    order = sorted(events, key=lambda event: (event[1], event[0]))  # case after case
    assert (events == order) != has_room
    assert (tmp_path / "round_0" / "review.csv").read_text().count("\n") == 4


def test_a_mask_that_cannot_be_written_stops_the_labeling(tmp_path, make_cached, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(label, "_write_mask", fail)
    part = (np.s_[:, :, :], to_probs(one_piece()), np.zeros((12, 12, 12), np.float32))
    raw = label.RawPseudoLabel([part], lambda _: None)
    names = {0: "background", 1: "organ", 2: "lesion"}
    options = (Expectation({1: 1.0}, {1: 0.2}), names, (0, 1, 2), FilterSection())
    folder = tmp_path / "round_0"
    with pytest.raises(OSError, match="no space left"):
        label.label_cases(
            [make_cached("a")], lambda _: raw, folder, None, "teacher", *options, lambda: False
        )
    assert not (folder / "review.csv").exists()
