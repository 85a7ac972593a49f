import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.config import ThresholdSection
from medssl.pseudo.thresholds import HIGHEST, ClassThresholds, find_surface, measure_coverage


def make(name="flex", num_classes=3, **section):
    return ClassThresholds(ThresholdSection(name=name, **section), num_classes)


def voxels(confidences):
    """Return probs (1, C, n, 1, 1) of (class, confidence) pairs; the rest is shared evenly."""
    probs = []
    for chosen, confidence in confidences:
        one = torch.full((3,), (1 - confidence) / 2)
        one[chosen] = confidence
        probs.append(one)
    return torch.stack(probs, 1)[None, :, :, None, None]


def all_valid(probs):
    return torch.ones_like(probs[:, :1], dtype=torch.bool)


def update(thresholds, probs, progress=0.0):
    thresholds.update(probs, all_valid(probs), progress)
    return thresholds.thresholds.tolist()


def test_a_fixed_threshold_stays_at_its_start():
    thresholds = make("fixed", start=0.8, end=0.5)
    probs = voxels([(0, 0.9)])
    assert update(thresholds, probs, 0.0) == update(thresholds, probs, 1.0)
    assert thresholds.thresholds.tolist() == pytest.approx([0.8] * 3)


def test_a_curriculum_falls_linearly_from_start_to_end():
    thresholds = make("curriculum", start=0.9, end=0.7)
    probs = voxels([(0, 0.9)])
    assert update(thresholds, probs, 0.0) == pytest.approx([0.9] * 3)
    assert update(thresholds, probs, 0.5) == pytest.approx([0.8] * 3)
    assert update(thresholds, probs, 1.0) == pytest.approx([0.7] * 3)


def test_without_a_threshold_every_voxel_is_accepted():
    thresholds = make("none")
    probs = voxels([(0, 0.4), (1, 0.5)])
    update(thresholds, probs)
    assert thresholds.accept(probs).all()


def test_flex_lowers_the_threshold_of_the_class_that_the_teacher_is_unsure_of():
    # by hand: class 2 reaches tau = 0.9 with all of its voxels, class 1 with 9 of 10
    probs = voxels([(2, 0.95)] * 30 + [(1, 0.95)] * 36 + [(1, 0.85)] * 4)
    found = update(make(start=0.9), probs)
    assert found[2] == pytest.approx(0.9)
    assert found[1] == pytest.approx(0.9 * 0.9 / (2 - 0.9))


def test_the_background_is_not_stricter_than_any_other_class():
    probs = voxels([(0, 0.99)] * 50 + [(2, 0.95)] * 30 + [(1, 0.95)] * 36 + [(1, 0.85)] * 4)
    found = update(make(start=0.9), probs)
    assert found[0] == min(found)


def test_flex_counts_inside_a_class_so_that_background_does_not_drown_the_rest():
    few = voxels([(0, 0.99)] * 30 + [(1, 0.99)] * 30)
    many = voxels([(0, 0.99)] * 3000 + [(1, 0.99)] * 30)
    assert update(make(), few)[:2] == pytest.approx(update(make(), many)[:2])


def test_a_class_with_too_few_voxels_keeps_its_last_threshold():
    thresholds = make(start=0.9)
    before = thresholds.thresholds[2].item()
    found = update(thresholds, voxels([(0, 0.95)] * 30 + [(2, 0.5)] * 5))
    assert found[2] == before


def test_voxels_that_do_not_count_change_nothing():
    thresholds = make()
    probs = voxels([(0, 0.99)] * 50 + [(1, 0.5)] * 50)
    before = {key: value.clone() for key, value in thresholds.state_dict().items()}
    thresholds.update(probs, torch.zeros_like(probs[:, :1], dtype=torch.bool), 0.0)
    assert all(torch.equal(before[key], value) for key, value in thresholds.state_dict().items())


@given(
    st.lists(st.tuples(st.integers(0, 2), st.floats(0.34, 1.0)), min_size=30, max_size=80),
    st.floats(0.0, 1.0),
)
@settings(max_examples=15, deadline=None)
def test_flex_thresholds_stay_between_the_floor_and_the_highest(pairs, progress):
    thresholds = make(start=1.0, end=0.0)
    thresholds.thresholds.fill_(0.7)
    found = torch.tensor(update(thresholds, voxels(pairs), progress))
    assert thresholds.floor - 1e-6 <= found.min()
    assert found.max() <= HIGHEST + 1e-6


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0.34, 1.0)), min_size=30, max_size=60))
@settings(max_examples=8, deadline=None)
def test_the_order_of_voxels_plays_no_part(pairs):
    assert update(make(), voxels(pairs)) == update(make(), voxels(pairs[::-1]))


def test_the_floor_is_higher_for_two_classes():
    assert make(num_classes=2).floor == 0.6
    assert make(num_classes=4).floor == pytest.approx(0.45)


def test_counts_and_thresholds_are_in_the_state():
    first, second = make(), make()
    update(first, voxels([(0, 0.99)] * 40 + [(1, 0.6)] * 40))
    second.load_state_dict(first.state_dict())
    probs = voxels([(2, 0.99)] * 30 + [(1, 0.99)] * 30)
    assert update(first, probs) == update(second, probs)
    assert update(make(), probs) != second.thresholds.tolist()


def test_a_voxel_is_judged_by_the_threshold_of_its_class():
    thresholds = make()
    thresholds.thresholds.copy_(torch.tensor([0.9, 0.5, 0.7]))
    accepted = thresholds.accept(voxels([(0, 0.8), (1, 0.8), (2, 0.7), (2, 0.6)]))
    assert accepted.flatten().tolist() == [False, True, True, False]


def test_the_surface_is_both_sides_of_a_border():
    classes = torch.zeros(1, 1, 6, 3, 3, dtype=torch.long)
    classes[:, :, 3:] = 1
    assert find_surface(classes)[0, 0, :, 1, 1].tolist() == [False, False, True, True, False, False]


def test_coverage_is_counted_per_class_and_on_surfaces():
    classes = torch.zeros(1, 1, 4, 1, 1, dtype=torch.long)
    classes[:, :, 2:] = 1
    accepted = torch.tensor([True, False, True, True])[None, None, :, None, None]
    valid = torch.ones_like(accepted)
    assert measure_coverage(accepted, classes, valid, ["background", "organ", "absent"]) == {
        "coverage": 0.75,
        "coverage_surface": 0.5,
        "coverage/background": 0.5,
        "coverage/organ": 1.0,
    }


def test_coverage_leaves_out_voxels_that_do_not_count():
    classes = torch.zeros(1, 1, 4, 1, 1, dtype=torch.long)
    accepted = torch.tensor([True, False, False, False])[None, None, :, None, None]
    valid = torch.tensor([True, True, False, False])[None, None, :, None, None]
    assert measure_coverage(accepted, classes, valid, ["background"])["coverage"] == 0.5
