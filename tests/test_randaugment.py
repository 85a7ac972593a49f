import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.transforms.randaugment import (
    LARGEST_VALUES,
    Operation,
    apply_intensity,
    draw_operations,
    spatial_matrix,
)
from medssl.transforms.spatial import draw_spatial

SPATIAL = ("rotate", "scale", "shear", "translate")
INTENSITY = tuple(name for name in LARGEST_VALUES if name not in SPATIAL)
RANDOM = ("noise", "bias_field", "histogram", "occlusion")


def draw(seed, num_operations=2, magnitude=9.0):
    return draw_operations(np.random.default_rng(seed), num_operations, magnitude)


def at(name, magnitude, place=0.3):
    return Operation(name, LARGEST_VALUES[name] * magnitude / 30, place)


def change(name, patch, magnitude=30.0, seed=0):
    return apply_intensity([at(name, magnitude)], patch, seed)


def make_patch(num_axes=3, num_channels=2, size=16):
    """Return smooth structure, an edge, and a little noise: what every operation can act on."""
    source = torch.Generator().manual_seed(1)
    coarse = torch.randn((1, num_channels, *[4] * num_axes), generator=source)
    mode = "trilinear" if num_axes == 3 else "bilinear"
    patch = torch.nn.functional.interpolate(coarse, size=[size] * num_axes, mode=mode)[0]
    patch = patch + (torch.arange(size) > size // 3)
    patch = patch + 0.1 * torch.randn(patch.shape, generator=source)
    return (patch - patch.mean()) / patch.std()


@given(st.integers(0, 10_000), st.integers(0, 15), st.floats(0, 30))
@settings(max_examples=50)
def test_no_operation_is_drawn_twice_and_values_stay_in_their_range(seed, count, magnitude):
    operations = draw(seed, count, magnitude)
    assert len({operation.name for operation in operations}) == count
    for operation in operations:
        limit = LARGEST_VALUES[operation.name] * magnitude / 30
        assert abs(operation.value) == pytest.approx(limit)
        assert 0 <= operation.place < 1


def test_every_operation_is_as_likely_as_the_others():
    names = [operation.name for seed in range(1500) for operation in draw(seed)]
    counts = [names.count(name) for name in LARGEST_VALUES]
    assert sum(counts) == 3000
    assert min(counts) > 150  # 200 are expected, with a standard deviation of 13
    assert max(counts) < 250


def test_only_operations_with_two_directions_are_drawn_with_both_signs():
    drawn = [operation for seed in range(60) for operation in draw(seed, 15)]
    backwards = {operation.name for operation in drawn if operation.value < 0}
    forwards = {operation.name for operation in drawn if operation.value > 0}
    assert backwards == {"brightness", "contrast", "gamma", *SPATIAL}
    assert forwards == set(LARGEST_VALUES)


def test_the_magnitude_scales_the_values_and_does_not_change_what_is_drawn():
    half, full = draw(3, 15, 15.0), draw(3, 15, 30.0)
    doubled = [Operation(o.name, 2 * o.value, o.place) for o in half]
    assert doubled == list(full)
    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


@pytest.mark.parametrize(("count", "magnitude"), [(16, 9.0), (-1, 9.0), (2, 30.5), (2, -1.0)])
def test_too_many_operations_and_a_magnitude_out_of_range_are_errors(count, magnitude):
    with pytest.raises(ValueError, match="is 0 to"):
        draw(0, count, magnitude)


@pytest.mark.parametrize("num_axes", [2, 3])
def test_at_magnitude_zero_nothing_changes(num_axes):
    operations, patch = draw(0, 15, 0.0), make_patch(num_axes)
    assert len(operations) == 15
    assert torch.equal(apply_intensity(operations, patch, 5), patch)
    matrix, offset = spatial_matrix(operations, [1.0, 2.0, 3.0][:num_axes])
    assert np.array_equal(matrix, np.eye(num_axes))
    assert not offset.any()


@pytest.mark.parametrize("num_axes", [2, 3])
@pytest.mark.parametrize("name", INTENSITY)
def test_a_larger_magnitude_changes_the_intensities_more(name, num_axes):
    patch = make_patch(num_axes)
    changes = [
        sum((change(name, patch, magnitude, seed) - patch).abs().mean().item() for seed in range(8))
        for magnitude in (0, 10, 20, 30)
    ]
    assert all(less < more for less, more in pairwise(changes)), changes


@pytest.mark.parametrize("num_axes", [2, 3])
@pytest.mark.parametrize("name", SPATIAL)
def test_a_larger_magnitude_moves_the_voxels_more(name, num_axes):
    corner = np.arange(1.0, num_axes + 1)
    moves = []
    for magnitude in (0, 5, 10, 20, 30):
        matrix, offset = spatial_matrix([at(name, magnitude)], [1.0] * num_axes)
        moves.append(np.linalg.norm(matrix @ corner - corner + offset))
    assert all(less < more for less, more in pairwise(moves)), moves


@pytest.mark.parametrize("name", INTENSITY)
def test_the_same_seed_gives_the_same_bits_and_the_patch_is_left_as_it_is(name):
    patch = make_patch()
    before = patch.clone()
    first = change(name, patch, seed=7)
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(first, change(name, patch, seed=7))
    assert torch.equal(patch, before)
    assert torch.equal(first, change(name, patch, seed=8)) == (name not in RANDOM)
    assert type(first) is torch.Tensor


@given(
    st.integers(0, 10_000),
    st.lists(st.integers(2, 9), min_size=2, max_size=3),
    st.integers(1, 2),
    st.floats(0, 30),
)
@settings(max_examples=40)
def test_any_operations_keep_shape_and_dtype_and_stay_finite(seed, size, channels, magnitude):
    source = torch.Generator().manual_seed(seed)
    patch = torch.randn((channels, *size), generator=source)
    result = apply_intensity(draw(seed, 15, magnitude), patch, seed)
    assert result.shape == patch.shape
    assert result.dtype == torch.float32
    assert result.isfinite().all()


@pytest.mark.parametrize("name", INTENSITY)
def test_an_even_patch_gives_no_warning_and_no_nan(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert change(name, torch.full((1, 8, 8, 8), 2.0)).isfinite().all()


@pytest.mark.parametrize(
    "name", ["blur", "sharpen", "contrast", "gamma", "bias_field", "low_resolution", "histogram"]
)
def test_an_even_patch_has_nothing_to_blur_or_to_stretch(name):
    even = torch.full((1, 8, 8, 8), 2.0)
    assert torch.allclose(change(name, even), even, atol=1e-3)


def test_operations_are_applied_in_their_order():
    patch = make_patch()
    shift, occlusion = at("brightness", 30), at("occlusion", 30)
    shifted_last = apply_intensity([occlusion, shift], patch, 0)
    assert (apply_intensity([shift, occlusion], patch, 0) == 0).sum() == 2 * 8**3
    assert (shifted_last == 1).sum() == 2 * 8**3


def test_spatial_operations_leave_the_intensities_alone():
    patch = make_patch()
    assert torch.equal(apply_intensity([at(name, 30) for name in SPATIAL], patch, 0), patch)


def test_noise_has_half_the_standard_deviation_of_the_scan():
    added = change("noise", torch.zeros(1, 24, 24, 24))
    assert added.std().item() == pytest.approx(0.5, rel=0.03)
    assert added.mean().item() == pytest.approx(0.0, abs=0.02)


def test_brightness_shifts_every_voxel_by_one_standard_deviation():
    patch = make_patch()
    assert torch.allclose(change("brightness", patch), patch + 1.0)


def test_contrast_is_scaled_about_the_mean_of_each_channel():
    patch = torch.tensor([[[0.0, 2.0]], [[10.0, 14.0]]])
    expected = torch.tensor([[[-0.7, 2.7]], [[8.6, 15.4]]])
    assert torch.allclose(change("contrast", patch), expected)


def test_gamma_bends_the_range_of_each_channel_and_keeps_its_mean_and_deviation():
    patch = torch.stack([torch.linspace(0, 1, 5), torch.linspace(-3, 5, 5)])[:, None]
    bent = change("gamma", patch)
    assert torch.allclose(bent.mean((1, 2)), patch.mean((1, 2)), atol=1e-5)
    assert torch.allclose(bent.std((1, 2)), patch.std((1, 2)), atol=1e-5)
    square = torch.tensor([0, 1 / 16, 4 / 16, 9 / 16, 1])  # an exponent of 2
    for row in bent[:, 0]:
        assert torch.allclose((row - row[0]) / (row[-1] - row[0]), square, atol=1e-5)


def test_a_blur_of_an_impulse_is_a_gaussian_of_that_width():
    patch = torch.zeros(1, 25, 25)
    patch[0, 12, 12] = 1.0
    profile = change("blur", patch)[0].sum(1)
    steps = torch.arange(25.0) - 12
    assert profile.sum().item() == pytest.approx(1.0, abs=1e-3)
    variance = (profile * steps**2).sum().item()
    assert variance == pytest.approx(2.0**2 + 1 / 12, rel=0.01)  # and that of a voxel


def test_sharpening_steepens_an_edge_as_gaussian_sharpening_does():
    from monai.transforms import GaussianSharpen

    patch = make_patch(size=16)
    expected = GaussianSharpen(sigma1=1e-3, sigma2=1.0, alpha=2.0)(patch)
    inner = (slice(None), *[slice(4, -4)] * 3)  # MONAI has zeros beyond the faces
    assert torch.allclose(change("sharpen", patch)[inner], expected[inner], atol=1e-4)


def test_a_bias_field_multiplies_all_channels_alike_from_their_minimum_on():
    patch = make_patch()
    low = patch.flatten(1).amin(1)[:, None, None, None]
    field = (change("bias_field", patch) - low) / (patch - low)
    known = (patch - low).amin(0) > 0.2
    assert torch.allclose(field[0][known], field[1][known], atol=1e-4)
    assert field[0][known].log().abs().max() > 0.1


@pytest.mark.parametrize("magnitude", [5, 10, 15, 20, 25, 30])
def test_a_lower_resolution_does_not_shift_the_patch(magnitude):
    ramp = torch.arange(24.0).expand(1, 24, 24, 24)
    moved = (change("low_resolution", ramp, magnitude) - ramp)[..., 4:-4]
    assert moved.mean().abs() < 0.02


@pytest.mark.parametrize("size", [(8, 8), (8, 8, 8)])
def test_gibbs_noise_takes_the_finest_structure_and_leaves_the_mean(size):
    index = torch.stack(torch.meshgrid(*[torch.arange(8)] * len(size), indexing="ij"))
    checkers = (index.sum(0) % 2).float()[None]
    assert torch.allclose(change("gibbs", checkers), torch.full((1, *size), 0.5), atol=1e-5)


def test_gibbs_noise_cuts_waves_beyond_two_fifths_of_the_radius_of_k_space():
    angles = 2 * torch.pi * torch.arange(16.0) / 16  # a radius of 0.4 * 16 / sqrt(2) = 4.5 waves
    for waves, is_kept in ((3, 1.0), (5, 0.0)):
        patch = torch.cos(waves * angles).expand(1, 16, 16)
        assert torch.allclose(change("gibbs", patch), is_kept * patch, atol=1e-5)


def test_a_histogram_shift_keeps_the_order_and_the_range_of_the_intensities():
    patch = torch.linspace(-2, 3, 64).reshape(1, 8, 8)
    for seed in range(5):
        shifted = change("histogram", patch, seed=seed).flatten()
        assert (shifted.diff() >= -1e-6).all()
        assert (shifted[0].item(), shifted[-1].item()) == pytest.approx((-2, 3), abs=1e-5)
        half = change("histogram", patch, 15, seed).flatten()
        assert torch.allclose(half, (shifted + patch.flatten()) / 2, atol=1e-5)


def test_an_occlusion_is_one_box_of_zeros_with_half_of_each_side():
    hidden = change("occlusion", torch.ones(2, 8, 6, 4)) == 0
    assert torch.equal(hidden[0], hidden[1])
    sides = [int(hidden[0].movedim(axis, 0).flatten(1).any(1).sum()) for axis in range(3)]
    assert sides == [4, 3, 2]
    assert hidden[0].sum() == 24


def test_a_rotation_is_rigid_in_mm():
    spacing = np.array([1.0, 0.5, 4.0])
    for place in (0.0, 0.4, 0.9):
        matrix, _ = spatial_matrix([at("rotate", 30, place)], spacing)
        turned = np.diag(spacing) @ matrix @ np.diag(1 / spacing)
        assert np.allclose(turned @ turned.T, np.eye(3))
        assert np.trace(turned) == pytest.approx(1 + 2 * np.cos(np.deg2rad(30)))


def test_a_rotation_is_about_each_axis_in_turn_and_about_the_only_one_in_2d():
    kept = [
        int(np.argmax(np.diag(spatial_matrix([at("rotate", 30, place)], [1.0] * 3)[0])))
        for place in (0.0, 0.34, 0.99)
    ]
    assert kept == [2, 1, 0]
    matrix, _ = spatial_matrix([at("rotate", 30, 0.99)], [1.0, 1.0])
    assert np.allclose(matrix, [[3**0.5 / 2, -0.5], [0.5, 3**0.5 / 2]])


def test_scale_shear_and_translation_are_what_the_table_says():
    matrix, offset = spatial_matrix([Operation("scale", -0.3, 0.0)], (1.0, 2.0, 3.0))
    assert np.allclose(matrix, 0.7 * np.eye(3))
    assert not offset.any()
    matrix, _ = spatial_matrix([Operation("shear", 0.3, 0.0)], (1.0, 2.0))
    assert np.allclose(matrix, [[1.0, 0.6], [0.0, 1.0]])  # 2 mm along J shift 0.6 voxels of 1 mm
    matrix, offset = spatial_matrix([Operation("translate", -0.2, 0.5)], (1.0, 2.0, 3.0))
    assert np.array_equal(matrix, np.eye(3))
    assert np.allclose(offset, [0, -0.2, 0])


def test_later_spatial_operations_act_on_the_result_of_earlier_ones():
    turn, shear = at("rotate", 30, 0.0), at("shear", 30, 0.0)
    matrices = [spatial_matrix([operation], (1.0, 1.0))[0] for operation in (turn, shear)]
    both, _ = spatial_matrix([turn, shear], (1.0, 1.0))
    assert np.allclose(both, matrices[1] @ matrices[0])
    assert not np.allclose(both, matrices[0] @ matrices[1])


def test_image_and_label_of_a_patch_see_the_same_operations():
    spacing = (1.0, 1.0, 2.0)
    extra = spatial_matrix([at(name, 30) for name in SPATIAL], spacing)
    found = draw_spatial(
        np.random.default_rng(0), (40, 40, 40), (8, 8, 8), (20, 20, 20), (), 0.0, spacing, extra
    )
    volume = np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij")).astype(np.float32)
    assert found.find_inside((40, 40, 40)).all()
    linear, nearest = found.sample(volume, nearest=False), found.sample(volume, nearest=True)
    assert torch.allclose(linear.movedim(0, -1), found.coordinates, atol=1e-3)
    assert (linear - nearest).abs().max() <= 0.5 + 1e-3
    assert (linear - nearest).abs().max() > 0.1  # the operations did move the patch off the voxels
