"""Metrics against values worked by hand, against MONAI, and against their laws."""

from __future__ import annotations

import math
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import DiceMetric, HausdorffDistanceMetric, SurfaceDiceMetric
from numpy.typing import NDArray
from scipy import stats
from scipy.ndimage import binary_erosion, distance_transform_edt
from scipy.stats import bootstrap

from medssl import metrics
from medssl.config import InputError
from medssl.metrics import (
    adjust_holm,
    bootstrap_mean,
    case_metrics,
    compare_cases,
    draw_difference,
    fill_absent,
    judge,
    mean_dice,
    mean_known,
    paired_difference,
    read_table,
    surface_tolerance,
)

Labels = NDArray[np.uint8]
SPACING = (0.5, 1.0, 3.0)


def box(*slices: tuple[int, int], shape: tuple[int, int, int] = (12, 12, 12)) -> Labels:
    """A box of class 1 in an empty volume, given by (start, stop) along I, J, K."""
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(*s) for s in slices)] = 1
    return labels


def blobs(seed: int, shape: tuple[int, int, int] = (9, 8, 7), num_classes: int = 3) -> Labels:
    """Random class indices in a few overlapping boxes."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    for c in range(1, num_classes):
        start = [int(rng.integers(0, n - 2)) for n in shape]
        labels[tuple(slice(s, s + int(rng.integers(1, 6))) for s in start)] = c
    return labels


def test_boxes_shifted_along_the_thick_axis_have_known_values() -> None:
    reference = box((2, 6), (2, 6), (2, 6))
    prediction = box((2, 6), (2, 6), (3, 7))
    m = case_metrics(prediction, reference, SPACING, 2)[1]
    assert m.dice == pytest.approx(2 * 48 / 128)
    # 56 surface voxels each, of which the 16 of the far face are one slice (3 mm) off: more
    # than 5 %, so they are the 95th percentile.
    assert m.hd95_mm == pytest.approx(3.0)
    assert m.volume_ml == pytest.approx(64 * 1.5 / 1000)
    assert m.reference_ml == pytest.approx(64 * 1.5 / 1000)
    assert m.missed == 0


@pytest.mark.parametrize(("axis", "shift", "expected"), [(0, 3, 1.5), (1, 2, 2.0), (2, 1, 3.0)])
def test_hd95_of_a_shift_is_its_length_in_mm(axis: int, shift: int, expected: float) -> None:
    reference = box((2, 8), (2, 8), (2, 8))
    m = case_metrics(np.roll(reference, shift, axis), reference, SPACING, 2)[1]
    assert m.hd95_mm == pytest.approx(expected)


def test_single_voxels_are_as_far_apart_as_their_centers() -> None:
    prediction, reference = box((1, 2), (1, 2), (1, 2)), box((7, 8), (5, 6), (5, 6))
    m = case_metrics(prediction, reference, SPACING, 2)[1]
    assert m.hd95_mm == pytest.approx(math.sqrt(3.0**2 + 4.0**2 + 12.0**2))  # 13 mm
    assert m.dice == 0.0
    assert m.surface_dice == 0.0
    assert m.missed == 0


def test_surface_dice_counts_surface_voxels_within_the_tolerance() -> None:
    # One row of 4 against one of 6 voxels, 1 mm apart: only the last voxel is beyond 1 mm.
    reference, prediction = box((2, 6), (2, 3), (2, 3)), box((2, 8), (2, 3), (2, 3))
    spacing = (1.0, 1.0, 1.0)
    assert case_metrics(prediction, reference, spacing, 2)[1].surface_dice == pytest.approx(9 / 10)
    tight = case_metrics(prediction, reference, spacing, 2, tolerance=0.5)[1].surface_dice
    assert tight == pytest.approx(8 / 10)
    assert case_metrics(prediction, reference, spacing, 2, tolerance=2.0)[1].surface_dice == 1.0


def test_the_tolerance_is_the_median_spacing_but_at_least_1_mm() -> None:
    assert surface_tolerance((0.5, 0.7, 5.0)) == 1.0
    assert surface_tolerance((0.5, 2.0, 5.0)) == 2.0
    assert surface_tolerance(None) == 1.0


def test_the_tolerance_of_fine_grids_is_no_larger_than_what_is_measured():
    reference, prediction = np.zeros((2, 30, 30, 30), np.uint8)
    reference[5:15, 5:15, 5:15] = prediction[12:22, 12:22, 12:22] = 1
    micro = case_metrics(prediction, reference, (0.05, 0.05, 0.05), 2)[1]
    assert micro.dice < 0.03
    assert micro.surface_dice < 0.5
    assert surface_tolerance((0.25, 0.25, 0.6)) == 1.0, "as in scans of people"
    assert surface_tolerance((0.001, 0.001, 0.001)) == pytest.approx(0.004)


def test_one_voxel_off_is_within_a_tolerance_of_one_voxel_despite_rounding() -> None:
    spacing = (float(np.float32(1.1)), 1.1, 1.0999999)
    reference = box((2, 3), (2, 6), (2, 6))
    m = case_metrics(np.roll(reference, 1, 0), reference, spacing, 2)[1]
    assert m.surface_dice == 1.0


def test_a_missed_structure_is_penalized_and_counted() -> None:
    m = case_metrics(box((0, 0)), box((2, 6), (2, 6), (2, 6)), (1.0, 2.0, 2.0), 2)[1]
    diagonal = math.sqrt(12**2 + 24**2 + 24**2)  # 36 mm
    assert (m.dice, m.hd95_mm, m.surface_dice, m.missed) == (0.0, diagonal, 0.0, 1)
    assert (m.volume_ml, m.reference_ml) == (0.0, pytest.approx(0.256))


def test_a_false_alarm_is_penalized_but_is_no_miss() -> None:
    m = case_metrics(box((2, 6), (2, 6), (2, 6)), box((0, 0)), (1.0, 2.0, 2.0), 2)[1]
    assert (m.dice, m.hd95_mm, m.surface_dice, m.missed) == (0.0, 36.0, 0.0, 0)


def test_a_class_absent_in_both_is_not_applicable() -> None:
    result = case_metrics(box((2, 6)), box((2, 6)), SPACING, 3)
    assert (result[2].dice, result[2].hd95_mm, result[2].surface_dice) == (None, None, None)
    assert result[2].missed == 0
    assert mean_dice(result) == 1.0
    assert mean_dice({2: result[2]}) is None


def test_a_missed_structure_never_scores_as_perfect_however_many_are_missed() -> None:
    reference = blobs(1, num_classes=4)
    present = [c for c in range(1, 4) if (reference == c).any()]
    result = case_metrics(np.zeros_like(reference), reference, SPACING, 4)
    assert all(result[c].missed == 1 and (result[c].hd95_mm or 0) > 10 for c in present)


def test_without_spacing_everything_is_in_voxels() -> None:
    reference = box((2, 8), (2, 8), (2, 8))
    m = case_metrics(np.roll(reference, 2, 2), reference, None, 2)[1]
    assert m.hd95_mm == pytest.approx(2.0)
    assert (m.volume_ml, m.reference_ml) == (216.0, 216.0)


def test_ignored_voxels_change_nothing_whatever_is_predicted_there() -> None:
    reference = box((2, 6), (2, 6), (2, 6))
    reference[8:] = 255
    prediction = np.roll(reference == 1, 1, 1).astype(np.uint8)
    clean = case_metrics(prediction, reference, SPACING, 3)
    noise = np.random.default_rng(0).integers(0, 3, reference.shape).astype(np.uint8)
    noisy = np.where(reference == 255, noise, prediction)
    assert case_metrics(noisy, reference, SPACING, 3) == clean
    assert clean[1].volume_ml == clean[1].reference_ml == pytest.approx(64 * 1.5 / 1000)


def test_the_border_of_the_annotation_is_no_surface() -> None:
    # A bar that crosses into unannotated slices: cut there in both masks, off by 2 mm elsewhere.
    reference = box((0, 12), (4, 6), (4, 6))
    reference[6:] = 255
    prediction = box((0, 12), (4, 6), (4, 6))
    prediction[:, 4:6] = 0
    prediction[:, 6:8, 4:6] = 1
    m = case_metrics(prediction, reference, (1.0, 1.0, 1.0), 2)[1]
    assert m.hd95_mm == pytest.approx(2.0)
    # A cube annotated up to its middle: an own, ideal prediction of the whole scores 1 and 0.
    cube = box((2, 8), (2, 8), (2, 8))
    half = np.where(np.arange(12)[:, None, None] > 5, 255, cube).astype(np.uint8)
    m = case_metrics(cube, half, SPACING, 2)[1]
    assert (m.dice, m.hd95_mm, m.surface_dice) == (1.0, 0.0, 1.0)


def test_structures_enclosed_by_ignored_voxels_are_still_measured() -> None:
    reference = np.full((9, 9, 9), 255, np.uint8)
    reference[3:6, 3:6, 3:6] = 1
    prediction = np.zeros_like(reference)
    prediction[3:6, 3:6, 3:5] = 1
    m = case_metrics(prediction, reference, (1.0, 1.0, 1.0), 2)[1]
    assert m.dice == pytest.approx(2 * 18 / 45)
    assert m.hd95_mm == pytest.approx(1.0)


def test_a_wholly_ignored_class_is_not_applicable() -> None:
    reference = np.full((4, 4, 4), 255, np.uint8)
    m = case_metrics(np.ones_like(reference), reference, SPACING, 2)[1]
    assert (m.dice, m.volume_ml, m.reference_ml) == (None, 0.0, 0.0)


def test_shapes_and_values_that_do_not_fit_are_refused() -> None:
    volume = np.zeros((3, 3, 3), np.uint8)
    with pytest.raises(ValueError, match="differ"):
        case_metrics(volume[:2], volume, SPACING, 2)
    with pytest.raises(ValueError, match=r"reference holds \[7\]"):
        case_metrics(volume, volume + 7, SPACING, 2)
    with pytest.raises(ValueError, match=r"prediction holds \[2\]"):
        case_metrics(volume + 2, volume, SPACING, 2)
    with pytest.raises(ValueError, match="spacing"):
        case_metrics(volume, volume, (1.0, 0.0, 1.0), 2)


def brute_force(
    prediction: Labels, reference: Labels, c: int, spacing: tuple[float, float, float]
) -> tuple[float, float]:
    """Return hd95 and surface_dice by distance transforms of the uncropped volume."""
    a, b = prediction == c, reference == c
    a_edge, b_edge = a & ~binary_erosion(a), b & ~binary_erosion(b)
    there = distance_transform_edt(~b_edge, sampling=spacing)[a_edge]
    back = distance_transform_edt(~a_edge, sampling=spacing)[b_edge]
    reach = surface_tolerance(spacing) + 1e-4
    close = (there <= reach).sum() + (back <= reach).sum()
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    return float(hd95), float(close / (len(there) + len(back)))


@settings(max_examples=60)
@given(a=st.integers(0, 10_000), b=st.integers(0, 10_000))
def test_cropping_changes_no_value(a: int, b: int) -> None:
    shape = (15, 13, 11)
    prediction, reference = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    offset = [(a + b) % 7, a % 6, b % 5]  # touches the border of the image, or not
    inner = tuple(slice(o, o + n) for o, n in zip(offset, (9, 8, 7), strict=True))
    prediction[inner], reference[inner] = blobs(a), blobs(b)
    for c, m in case_metrics(prediction, reference, SPACING, 3).items():
        if (prediction == c).any() and (reference == c).any():
            expected = brute_force(prediction, reference, c, SPACING)
            assert (m.hd95_mm, m.surface_dice) == pytest.approx(expected)


@settings(max_examples=40)
@given(a=st.integers(0, 10_000), b=st.integers(0, 10_000), thin=st.sampled_from([None, 0, 2]))
def test_a_class_in_its_box_has_the_values_of_the_whole_to_the_bit(
    a: int, b: int, thin: int | None
) -> None:
    shape = tuple(1 if axis == thin else n for axis, n in enumerate((11, 10, 9)))
    prediction, reference = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    prediction[:9, :8, :7], reference[:9, :8, :7] = (
        blobs(seed, num_classes=4)[tuple(slice(n) for n in shape)] for seed in (a, b)
    )
    reference[6:] = 255
    ignored, spacing = reference == 255, (0.7, 1.1, 2.9)
    whole = {
        c: metrics._measure_class(
            (prediction == c) & ~ignored, reference == c, ignored, spacing, 1.0, shape
        )
        for c in range(1, 4)
    }
    assert case_metrics(prediction, reference, spacing, 4, 1.0) == whole


def test_the_memory_of_a_measurement_is_that_of_its_largest_structure() -> None:
    reference = box((30, 60), (30, 60), (30, 60), shape=(160, 160, 160))
    reference[90:110, 90:110, 90:110] = 2
    prediction = np.roll(reference, 1, 0)
    tracemalloc.start()
    case_metrics(prediction, reference, SPACING, 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < reference.size, "bytes: less than one mask of the whole"


@pytest.mark.parametrize("seed", range(5))
def test_monai_agrees_where_it_is_defined(seed: int) -> None:
    rng = np.random.default_rng(seed)
    smooth = torch.from_numpy(rng.normal(size=(2, 3, 16, 18, 14)))
    for _ in range(3):
        smooth = torch.nn.functional.avg_pool3d(smooth, 3, 1, 1)
    smooth[1] = 0.5 * smooth[0] + 0.5 * smooth[1]
    prediction, reference = smooth.argmax(1)
    one_hot = [
        torch.nn.functional.one_hot(x, 3).movedim(-1, 0)[None] for x in (prediction, reference)
    ]
    hd = HausdorffDistanceMetric(percentile=95, include_background=False)
    surface = SurfaceDiceMetric([1.0003, 1.0003], include_background=False)
    dice = DiceMetric(include_background=False)
    spacing = (1.0, 0.8, 2.5)
    ours = case_metrics(
        prediction.numpy().astype(np.uint8), reference.numpy().astype(np.uint8), spacing, 3
    )
    expected_hd = hd(*one_hot, spacing=spacing)[0]
    expected_surface = surface(*one_hot, spacing=spacing)[0]
    expected_dice = dice(*one_hot)[0]
    for c in (1, 2):
        assert ours[c].hd95_mm == pytest.approx(float(expected_hd[c - 1]), rel=1e-5)
        assert ours[c].surface_dice == pytest.approx(float(expected_surface[c - 1]), rel=1e-5)
        assert ours[c].dice == pytest.approx(float(expected_dice[c - 1]), rel=1e-5)


SEEDS = st.integers(0, 10_000)


@settings(max_examples=40)
@given(a=SEEDS, b=SEEDS)
def test_metrics_are_symmetric_but_for_missed(a: int, b: int) -> None:
    there = case_metrics(blobs(a), blobs(b), SPACING, 3)
    back = case_metrics(blobs(b), blobs(a), SPACING, 3)
    for c in (1, 2):
        assert there[c].dice == back[c].dice
        assert there[c].hd95_mm == pytest.approx(back[c].hd95_mm)
        assert there[c].surface_dice == pytest.approx(back[c].surface_dice)
        assert (there[c].volume_ml, there[c].reference_ml) == (
            back[c].reference_ml,
            back[c].volume_ml,
        )


@settings(max_examples=40)
@given(a=SEEDS, b=SEEDS)
def test_metrics_stay_within_their_bounds(a: int, b: int) -> None:
    prediction = blobs(a)
    diagonal = float(np.linalg.norm(np.array(SPACING) * prediction.shape))
    for m in case_metrics(prediction, blobs(b), SPACING, 3).values():
        if m.dice is None:
            continue
        assert m.hd95_mm is not None
        assert m.surface_dice is not None
        assert 0 <= m.dice <= 1
        assert 0 <= m.surface_dice <= 1
        assert 0 <= m.hd95_mm <= diagonal
        assert m.missed == 0 or m.hd95_mm == diagonal


@settings(max_examples=20)
@given(a=SEEDS)
def test_a_prediction_equal_to_the_reference_is_perfect(a: int) -> None:
    for m in case_metrics(blobs(a), blobs(a), SPACING, 3).values():
        assert (m.dice, m.hd95_mm, m.surface_dice, m.missed) in [
            (1.0, 0.0, 1.0, 0),
            (None, None, None, 0),
        ]


@settings(max_examples=30)
@given(a=SEEDS, b=SEEDS, order=st.permutations(range(3)), flipped=st.sets(st.integers(0, 2)))
def test_turning_the_volume_with_its_spacing_changes_nothing(
    a: int, b: int, order: list[int], flipped: set[int]
) -> None:
    def turn(labels: Labels) -> Labels:
        return np.flip(labels.transpose(order), axis=tuple(flipped))

    straight = case_metrics(blobs(a), blobs(b), SPACING, 3)
    spacing = [SPACING[axis] for axis in order]
    turned = case_metrics(turn(blobs(a)), turn(blobs(b)), spacing, 3)
    for c in (1, 2):
        assert turned[c].dice == straight[c].dice
        assert turned[c].hd95_mm == pytest.approx(straight[c].hd95_mm)
        assert turned[c].surface_dice == pytest.approx(straight[c].surface_dice)


@settings(max_examples=20)
@given(a=SEEDS, b=SEEDS, factor=st.floats(0.1, 10))
def test_hd95_scales_with_the_spacing(a: int, b: int, factor: float) -> None:
    once = case_metrics(blobs(a), blobs(b), SPACING, 2 + 1)
    scaled = case_metrics(blobs(a), blobs(b), [factor * s for s in SPACING], 3)
    for c in (1, 2):
        if once[c].hd95_mm is not None:
            assert scaled[c].hd95_mm == pytest.approx(factor * (once[c].hd95_mm or 0.0))
        assert scaled[c].volume_ml == pytest.approx(factor**3 * once[c].volume_ml)


def test_a_large_volume_is_measured_within_seconds() -> None:
    index = np.indices((256, 256, 200), dtype=np.int16)
    radius = sum((axis - 100) ** 2 for axis in index.astype(np.int32))
    reference = (radius < 50**2).astype(np.uint8)
    prediction = np.roll(reference, 4, 0)
    start = time.perf_counter()
    m = case_metrics(prediction, reference, (1.0, 1.0, 1.0), 2)[1]
    assert time.perf_counter() - start < 10
    assert m.hd95_mm == pytest.approx(4.0, abs=0.3)


def test_the_interval_of_a_mean_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).normal(0.8, 0.1, 40)
    ours = bootstrap_mean(values.tolist())
    theirs = bootstrap((values,), np.mean, n_resamples=10_000, method="percentile")
    assert ours["mean"] == pytest.approx(values.mean())
    assert ours["low"] == pytest.approx(theirs.confidence_interval.low, abs=2e-3)
    assert ours["high"] == pytest.approx(theirs.confidence_interval.high, abs=2e-3)
    assert (ours["n"], ours["num_dropped"]) == (40, 0)


def test_the_interval_holds_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        estimate = bootstrap_mean(rng.normal(0.0, 1.0, 30).tolist())
        assert estimate["low"] is not None
        assert estimate["high"] is not None
        held += estimate["low"] <= 0.0 <= estimate["high"]
    assert 180 <= held <= 200


def test_missing_values_are_left_out_and_counted() -> None:
    estimate = bootstrap_mean([0.5, None, 0.7, float("nan")])
    assert estimate["mean"] == pytest.approx(0.6)
    assert (estimate["n"], estimate["num_dropped"]) == (2, 2)
    difference = paired_difference([0.5, None, 0.7], [0.4, None, 0.5])
    assert difference["mean"] == pytest.approx(0.15)
    assert (difference["n"], difference["num_dropped"]) == (2, 1)


def test_false_alarms_on_healthy_cases_are_in_the_paired_difference() -> None:
    base: list[float | None] = [0.6] * 10 + [None] * 20
    better_but_alarmed: list[float | None] = [0.65] * 10 + [0.0] * 20
    difference = paired_difference(better_but_alarmed, base)
    assert difference["mean"] == pytest.approx((10 * 0.05 - 20) / 30)
    assert (difference["n"], difference["num_dropped"]) == (30, 0)
    assert judge(difference) == "no gain"
    assert judge(paired_difference(base, better_but_alarmed)) == "gain"


def test_patients_are_drawn_with_all_of_their_scans() -> None:
    rng = np.random.default_rng(0)
    per_patient = rng.normal(0.7, 0.1, 10)
    values = np.repeat(per_patient, 8).tolist()
    patients = [f"p{index // 8}" for index in range(80)]
    of_scans, of_patients = bootstrap_mean(values), bootstrap_mean(values, patients=patients)
    assert of_patients["mean"] == pytest.approx(of_scans["mean"])
    assert (of_patients["n"], of_patients["num_patients"]) == (80, 10)
    assert of_scans["num_patients"] == 80
    alone = bootstrap_mean(per_patient.tolist())  # eight copies of a patient say no more than one
    assert of_patients["low"] == pytest.approx(alone["low"])
    assert of_patients["high"] == pytest.approx(alone["high"])


def test_patients_of_many_scans_weigh_as_much_as_their_scans() -> None:
    estimate = bootstrap_mean([0.0, 1.0, 1.0, 1.0], patients=["a", "b", "b", "b"])
    assert (estimate["mean"], estimate["low"], estimate["high"]) == (0.75, 0.0, 1.0)


def test_many_scans_of_few_patients_are_no_evidence() -> None:
    base, better = [0.5] * 20, [0.6] * 20
    patients = [f"p{index % 2}" for index in range(20)]
    assert judge(paired_difference(better, base)) == "gain"
    assert judge(paired_difference(better, base, patients=patients)) == "no verdict"


def test_too_few_values_give_no_interval() -> None:
    assert bootstrap_mean([]) == {
        "mean": None, "low": None, "high": None, "n": 0, "num_patients": 0, "num_dropped": 0
    }  # fmt: skip
    one = paired_difference([0.5], [0.25])
    assert (one["mean"], one["low"], one["high"], one["p"]) == (0.25, None, None, None)


def test_the_same_values_give_the_same_interval() -> None:
    values = np.random.default_rng(4).random(20).tolist()
    assert bootstrap_mean(values) == bootstrap_mean(values)


def test_the_block_size_of_the_resampling_changes_no_shape() -> None:
    values, sizes = np.linspace(0.0, 1.0, 5000), np.ones(5000, int)
    assert metrics._resample_means(values, sizes).shape == (metrics.NUM_RESAMPLES,)


CASES = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=20)


@settings(max_examples=20)
@given(values=CASES)
def test_the_mean_lies_in_its_interval_and_the_interval_in_the_range(values: list[float]) -> None:
    estimate = bootstrap_mean(values)
    assert estimate["low"] is not None
    assert estimate["high"] is not None
    assert estimate["mean"] is not None
    assert min(values) - 1e-9 <= estimate["low"] <= estimate["high"] <= max(values) + 1e-9


@settings(max_examples=20)
@given(values=CASES, shift=st.floats(-1, 1, width=32))
def test_the_paired_difference_sees_no_spread_between_cases(
    values: list[float], shift: float
) -> None:
    difference = paired_difference([v + shift for v in values], values)
    assert difference["low"] == pytest.approx(shift, abs=1e-6)
    assert difference["high"] == pytest.approx(shift, abs=1e-6)


def test_swapping_the_arms_mirrors_the_difference() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random(15).tolist(), rng.random(15).tolist()
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert (there["mean"] or 0) == pytest.approx(-(back["mean"] or 0))
    assert (there["low"] or 0) == pytest.approx(-(back["high"] or 0), abs=1e-6)
    assert there["p"] == back["p"]


def test_pairs_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="same cases"):
        paired_difference([0.1], [0.1, 0.2])


def test_p_is_small_for_a_clear_difference_and_1_for_none() -> None:
    base = [0.5, 0.6, 0.7, 0.4, 0.5, 0.6, 0.8, 0.7]
    clear = paired_difference([v + 0.1 for v in base], base)["p"]
    assert clear is not None
    assert clear < 0.001
    assert paired_difference(base, base)["p"] == 1.0


def test_a_gain_needs_eight_cases_and_an_interval_above_zero() -> None:
    base = [0.5, 0.6, 0.7, 0.4, 0.5, 0.6, 0.8, 0.7]
    better = [v + 0.1 for v in base]
    mixed = [v + d for v, d in zip(base, [0.1, -0.1] * 4, strict=True)]
    assert judge(paired_difference(better, base)) == "gain"
    assert judge(paired_difference(base, better)) == "no gain"
    assert judge(paired_difference(mixed, base)) == "no gain"
    assert judge(paired_difference(base, base)) == "no gain"
    assert judge(paired_difference(better[:7], base[:7])) == "no verdict"
    assert judge(paired_difference([None, *better[1:]], [None, *base[1:]])) == "no verdict"
    assert judge(None) == "not measured"


def test_a_difference_over_draws_is_the_mean_of_the_draws():
    patients = ["a", "a", "b", "c"]
    table = [[0.1, 0.3, 0.2, 0.0], [0.0, 0.2, 0.1, None]]
    found = draw_difference(table, patients)
    assert found["per_draw"] == pytest.approx([0.15, 0.1])
    assert found["mean"] == pytest.approx(0.125)
    assert found["low"] < 0.125 < found["high"]
    assert found["t_low"] < 0.0 < 0.25 < found["t_high"]


def test_t_over_draws_counts_what_patients_have_in_common_in_all_draws():
    # By hand: means of draws 1, 3 and of patients 0, 2, 4; residuals -1, 0, 1 and their negatives.
    # Mean squares: draws 3 * 2, patients 2 * 4, rest 4 / 2; 6 + 8 - 2 = 12, over 6: variance 2.
    found = draw_difference([[-2.0, 1.0, 4.0], [2.0, 3.0, 4.0]], ["a", "b", "c"])
    assert found["mean"] == pytest.approx(2.0)
    freedom = (12 / 6) ** 2
    reach = stats.t.ppf(0.975, freedom) * math.sqrt(2)
    assert (found["t_low"], found["t_high"]) == pytest.approx((2 - reach, 2 + reach))
    assert found["p"] == pytest.approx(2 * stats.t.sf(math.sqrt(2), freedom))


def test_t_over_draws_is_student_s_where_patients_have_nothing_in_common():
    table = [[0.0, 0.3], [0.4, 0.1], [0.2, 0.2]]
    plain = stats.ttest_1samp([0.15, 0.25, 0.2], 0.0)
    found = draw_difference(table, ["a", "b"])
    assert found["p"] == pytest.approx(plain.pvalue)
    assert found["t_low"] == pytest.approx(plain.confidence_interval().low)
    one = draw_difference([[0.1], [0.3]], ["a"])
    assert one["p"] == pytest.approx(stats.ttest_1samp([0.1, 0.3], 0.0).pvalue)


def test_patients_who_differ_alike_in_all_draws_are_as_uncertain_as_their_number_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        common = rng.normal(0.0, 0.1, 15)
        table = common + rng.normal(0.0, 0.01, (5, 1)) + rng.normal(0.0, 0.05, (5, 15))
        draws, patients = table.shape
        error, freedom = metrics._find_crossed_error(table, np.ones((draws, patients)))
        hits += abs(table.mean()) < stats.t.ppf(0.975, freedom) * error
    assert 0.91 < hits / 200 < 0.99


def test_a_draw_without_a_value_is_left_out_and_equal_arms_have_no_p():
    found = draw_difference([[None, None], [0.1, 0.3]], ["a", "b"])
    assert (found["mean"], *found["per_draw"]) == pytest.approx((0.2, 0.2))
    same = draw_difference([[0.0, 0.0], [0.0, 0.0]], ["a", "b"])
    assert (same["p"], same["t_low"], same["t_high"]) == (1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="no draw has a value"):
        draw_difference([[None, math.nan]], ["a", "b"])


def test_a_difference_over_draws_holds_no_table_of_patients_by_patients(monkeypatch):
    monkeypatch.setattr(metrics, "NUM_RESAMPLES", 20)
    patients = [f"p{number}" for number in range(3000)]
    tracemalloc.start()
    draw_difference([[0.1] * 3000, [0.2] * 3000], patients)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3000 * 3000


def test_one_draw_has_no_interval_over_draws():
    found = draw_difference([[0.1, 0.2, 0.3]], ["a", "b", "c"])
    assert (found["t_low"], found["t_high"], found["p"]) == (None, None, None)
    assert found["low"] < found["high"]


def test_draws_that_disagree_widen_the_interval_that_cases_alone_would_give():
    patients = [f"p{i}" for i in range(20)]
    rng = np.random.default_rng(0)
    noise = 0.001 * rng.standard_normal((3, 20))
    alike = draw_difference(list(0.05 + noise), patients)
    apart = draw_difference(list(np.array([[0.0], [0.05], [0.1]]) + noise), patients)
    assert alike["mean"] == pytest.approx(apart["mean"], abs=1e-3)
    assert apart["high"] - apart["low"] > 10 * (alike["high"] - alike["low"])


def test_draws_need_the_same_cases():
    with pytest.raises(ValueError, match="for 2 cases"):
        draw_difference([[0.1]], ["a", "b"])


def test_holm_adjusts_in_order_and_never_falls():
    assert adjust_holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjust_holm([0.9, 0.8]) == [1.0, 1.0]
    assert adjust_holm([]) == []


def test_models_side_by_side_are_compared_class_by_class_before_the_mean() -> None:
    first = [{"dice/a": 0.90, "dice/b": 0.0, "dice": 0.45}] * 10  # a false alarm of b
    second = [{"dice/a": 0.44, "dice/b": None, "dice": 0.44}] * 10
    ours, theirs = compare_cases([second, first])
    assert ours == pytest.approx([(0.44 + 1) / 2] * 10)
    assert theirs == pytest.approx([0.45] * 10)
    assert paired_difference(ours, theirs)["mean"] == pytest.approx((-0.46 + 1.0) / 2)
    assert mean_known(row["dice"] for row in second) == pytest.approx(0.44)  # alone


def test_a_class_that_no_model_finds_says_nothing_side_by_side() -> None:
    rows = [{"dice/a": 0.5, "dice/b": None, "dice": 0.5}]
    assert compare_cases([rows, rows, rows]) == [[0.5]] * 3
    nothing = [{"dice/a": None, "dice": None}]
    assert compare_cases([nothing, nothing]) == [[None], [None]]
    assert fill_absent([[None, math.nan], [3.5, None]], perfect=0.0) == [[0.0, None], [3.5, None]]
    assert mean_known([None, math.nan]) is None


@given(st.lists(st.tuples(*[st.one_of(st.none(), st.floats(0, 1))] * 4), min_size=1, max_size=6))
def test_the_difference_of_means_side_by_side_is_the_mean_difference(cells: Any) -> None:
    tables = [
        [{"dice/a": row[i], "dice/b": row[i + 1], "dice": None} for row in cells] for i in (0, 2)
    ]
    ours, theirs = compare_cases(tables)
    assert [a is None for a in ours] == [b is None for b in theirs]
    if any(a is not None for a in ours):
        difference = paired_difference(ours, theirs)["mean"]
        expected = (mean_known(ours) or 0.0) - (mean_known(theirs) or 0.0)
        assert difference == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "text", ["", "[]", "5\n", "null\n", "case_id,dice/a,dice\n", "case_id,dice/a,dice\nx,0.5",
             "case_id,dice/a,dice\nx,0.51,0.5", "case_id,dice/a,dice\nx,0.5\n"],
)  # fmt: skip
def test_a_table_that_is_cut_off_is_refused_not_read_as_na(tmp_path: Path, text: str) -> None:
    (tmp_path / "per_case.csv").write_text(text)
    with pytest.raises(InputError, match=r"per_case\.csv"):
        read_table(tmp_path / "per_case.csv")
