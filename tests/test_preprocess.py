import numpy as np
import pytest
from pydantic import ValidationError
from scipy.spatial.transform import Rotation

from medssl.config import IGNORE, InputError
from medssl.transforms.geometry import Volume, cache_grid, resample, to_native
from medssl.transforms.preprocess import (
    Normalization,
    Preprocessing,
    measure_percentiles,
    preprocess_image,
    preprocess_label,
)

ZSCORE = Normalization(kind="zscore")
CT = Normalization(kind="ct", low=-100, high=300, mean=50, std=100)


def recipe(spacing=(1.0, 1.0, 1.0), *normalization):
    return Preprocessing(spacing=spacing, normalization=normalization or (ZSCORE,))


def make_image(*shape, seed=0):
    return np.random.default_rng(seed).gamma(2, 100, shape).astype(np.float32)


def test_zscore_does_not_depend_on_the_units_of_the_scan():
    image = make_image(1, 9, 10, 11)
    first = preprocess_image(Volume(image, np.eye(4)), recipe()).array
    second = preprocess_image(Volume(image * 7 + 300, np.eye(4)), recipe()).array
    np.testing.assert_allclose(first, second, atol=1e-4)
    assert first.dtype == np.float32
    assert first.mean() == pytest.approx(0, abs=1e-3)
    assert first.std() == pytest.approx(1, abs=1e-3)


def test_one_glaring_voxel_changes_next_to_nothing():
    image = make_image(1, 12, 12, 12)
    plain = preprocess_image(Volume(image, np.eye(4)), recipe()).array
    image[0, 0, 0, 0] = 1e9
    glaring = preprocess_image(Volume(image, np.eye(4)), recipe()).array
    assert np.abs(glaring - plain)[0, 1:].max() < 0.05
    assert np.isfinite(glaring.astype(np.float16)).all()


def test_empty_voxels_count_only_while_they_are_few():
    image = make_image(1, 10, 10, 10) + 50
    many = image.copy()
    many[:, :5] = 0
    inside = preprocess_image(Volume(many, np.eye(4)), recipe()).array[:, 5:]
    assert inside.mean() == pytest.approx(0, abs=1e-2)
    few = image.copy()
    few[:, :2] = 0
    assert preprocess_image(Volume(few, np.eye(4)), recipe()).array[:, 2:].mean() > 0.1


@pytest.mark.parametrize("value", [0.0, 1.0, -1024.0, 30_000.0])
def test_a_constant_scan_becomes_zero(value):
    image = np.full((1, 4, 5, 6), value, dtype=np.float32)
    assert not preprocess_image(Volume(image, np.eye(4)), recipe()).array.any()


def test_a_binary_scan_keeps_its_two_values():
    image = np.zeros((1, 10, 10, 10), dtype=np.float32)
    image[0, 2, 2, 2:4] = 1
    found = preprocess_image(Volume(image, np.eye(4)), recipe()).array
    assert len(np.unique(found)) == 2


def test_ct_uses_the_stored_numbers_alone():
    image = np.array([-1000, -100, 50, 300, 3000], dtype=np.float32).reshape(1, 5, 1, 1)
    found = preprocess_image(Volume(image, np.eye(4)), recipe((1, 1, 1), CT)).array
    np.testing.assert_allclose(found.ravel(), [-1.5, -1.5, 0, 2.5, 2.5])


def test_each_channel_has_its_own_normalization():
    image = np.stack([make_image(6, 6, 6), np.full((6, 6, 6), 150, np.float32)])
    found = preprocess_image(Volume(image, np.eye(4)), recipe((1, 1, 1), ZSCORE, CT)).array
    assert found[0].std() == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(found[1], 1)


def test_the_result_lies_on_the_cache_grid():
    affine = np.diag([-0.5, 2, 3, 1])
    found = preprocess_image(Volume(make_image(1, 20, 10, 4), affine), recipe((1, 1, 1)))
    shape, grid = cache_grid((20, 10, 4), affine, (1, 1, 1))
    assert found.shape == shape == (10, 20, 12)
    np.testing.assert_array_equal(found.affine, grid)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_scan_with_a_nonfinite_voxel_is_refused(bad):
    image = make_image(1, 4, 4, 4)
    image[0, 1, 2, 3] = bad
    with pytest.raises(InputError, match="1 of 64 voxels"):
        preprocess_image(Volume(image, np.eye(4)), recipe())


@pytest.mark.parametrize("sizes", [(1000, 1000, 1000), (9000, 100, 100)])
def test_a_cache_grid_that_nobody_can_compute_is_refused_with_both_spacings(sizes):
    affine = np.diag([*sizes, 1.0])
    with pytest.raises(InputError, match=f"of {sizes[0]} x .* of 1 x 1 x 1 mm, .* GiB, more than"):
        preprocess_image(Volume(make_image(1, 20, 10, 4), affine), recipe((1, 1, 1)))


def test_a_scan_with_other_channels_is_refused():
    with pytest.raises(InputError, match="2 channels"):
        preprocess_image(Volume(make_image(2, 4, 4, 4), np.eye(4)), recipe())


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "ct"},
        {"kind": "ct", "low": 3, "high": 1, "mean": 0, "std": 1},
        {"kind": "ct", "low": 0, "high": 1, "mean": 0, "std": 0},
        {"kind": "ct", "low": 0, "high": float("inf"), "mean": 0, "std": 1},
        {"kind": "zscore", "mean": 3},
        {"kind": "minmax"},
        {"kind": "zscore", "clip": True},
    ],
)
def test_a_normalization_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValidationError):
        Normalization(**wrong)


def test_a_recipe_survives_json_and_refuses_nonsense():
    made = recipe((0.7, 0.8, 3.0), ZSCORE, CT)
    assert Preprocessing.model_validate_json(made.model_dump_json()) == made
    with pytest.raises(ValidationError):
        recipe((0.0, 1.0, 1.0))
    with pytest.raises(ValidationError):
        Preprocessing(spacing=(1, 1, 1), normalization=())


def test_a_label_on_its_own_grid_is_copied():
    label = np.random.default_rng(0).choice([0, 1, 2, IGNORE], (5, 6, 7)).astype(np.uint8)
    affine = np.diag([-1, -1, 1, 1.0])
    shape, grid = cache_grid((5, 6, 7), affine, (1, 1, 1))
    found = preprocess_label(label, affine, shape, grid)
    np.testing.assert_array_equal(found, label[::-1, ::-1])
    assert found.dtype == np.uint8


def test_a_label_is_not_mixed_into_classes_between():
    label = np.zeros((8, 8, 8), dtype=np.uint8)
    label[4:] = 3
    label[:, 6:] = IGNORE
    shape, grid = cache_grid((8, 8, 8), np.eye(4), (0.7, 0.7, 0.7))
    assert set(np.unique(preprocess_label(label, np.eye(4), shape, grid))) == {0, 3, IGNORE}


def test_a_label_is_brought_to_the_grid_as_by_arrays_of_floats():
    label = np.random.default_rng(0).choice([0, 1, 2, 5, IGNORE], (9, 8, 7)).astype(np.uint8)
    label[2:6, 1:5] = 2
    affine = np.diag([-0.8, 0.9, 1.3, 1])
    shape, grid = cache_grid(label.shape, affine, (1.0, 1.0, 1.0))
    shares = [
        resample((label == c).astype(np.float32)[None], affine, shape, grid, "linear")[0]
        for c in (0, 1, 2, 5)
    ]
    expected = np.array([0, 1, 2, 5])[np.argmax(shares, 0)]
    nearest = resample(label[None], affine, shape, grid, "nearest")[0]
    expected[nearest == IGNORE] = IGNORE
    np.testing.assert_array_equal(preprocess_label(label, affine, shape, grid), expected)


@pytest.mark.parametrize("how", [ZSCORE, CT])
@pytest.mark.parametrize("spacing", [(1, 1, 1), (1.5, 1, 1)])
def test_a_scan_that_may_be_written_over_gives_the_same_to_the_bit(how, spacing):
    image = make_image(1, 12, 10, 8)
    image[0, :5] = 0  # of which the z-score takes no numbers
    kept = image.copy()
    plain = preprocess_image(Volume(image, np.eye(4)), recipe(spacing, how)).array
    np.testing.assert_array_equal(image, kept)
    over = preprocess_image(Volume(image, np.eye(4)), recipe(spacing, how), overwrite=True).array
    np.testing.assert_array_equal(over, plain)


def test_a_label_keeps_its_volume_on_an_oblique_anisotropic_grid():
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [15, 25, -35], degrees=True).as_matrix()
    affine[:3, :3] *= [0.9, 0.9, 2.4]
    grid = np.stack(np.meshgrid(*map(np.arange, (40, 40, 16)), indexing="ij"), -1)
    ball = (np.linalg.norm((grid - [20, 20, 8]) * [0.9, 0.9, 2.4], axis=-1) < 11).astype(np.uint8)
    shape, cache = cache_grid(ball.shape, affine, (1, 1, 1))
    found = preprocess_label(ball, affine, shape, cache)
    assert found.sum() == pytest.approx(ball.sum() * 0.9 * 0.9 * 2.4, rel=0.02)


@pytest.mark.parametrize("angles", [(0, 0, 0), (14, -21, 33)], ids=["straight", "oblique"])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)], ids=["RAS", "LPS", "RPI"])
@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.8, 0.8, 3), (2.1, 0.9, 0.9)])
def test_a_perfect_prediction_of_a_box_comes_back_with_dice_above_99_percent(
    angles, signs, spacing
):
    """The image is the box; what the network would say is read off the preprocessed image."""
    shape = tuple(int(60 / step) for step in spacing)
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine[:3, :3] = turn * signs * spacing
    affine[:3, 3] = (-31, 17, 244)
    box = np.zeros(shape, dtype=np.uint8)
    box[tuple(slice(size // 4, size - size // 3) for size in shape)] = 1
    image = Volume(box[None].astype(np.float32) * 800 + 100, affine)
    found = preprocess_image(image, recipe((1.0, 1.0, 1.0)))
    values = found.array.astype(np.float16).astype(np.float32)
    foreground = (values - values.min()) / (values.max() - values.min())
    probs = np.concatenate([1 - foreground, foreground])
    back = to_native(probs, found.affine, shape, affine).argmax(0)
    assert 2 * (back & box).sum() / (back.sum() + box.sum()) >= 0.99


def test_percentiles_are_those_of_the_raw_scan():
    image = np.linspace(0, 1000, 1001, dtype=np.float32).reshape(1, 1001, 1, 1)
    assert measure_percentiles(Volume(image, np.eye(4))) == (pytest.approx((5, 500, 995)),)
