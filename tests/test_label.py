"""Islands: only those of classes that are one piece in every labeled case are taken out."""

import numpy as np

from medssl.data.pseudo_labels import write_pseudo_label
from medssl.pseudo import label
from medssl.pseudo.gates import expect_from, find_islands


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
