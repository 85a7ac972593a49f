import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medssl.transforms.spatial import SpatialDraw, draw_spatial, draw_turn, turn_volume

SHAPE = (13, 11, 9)
PATCH = (8, 8, 8)
sizes = st.tuples(*[st.integers(1, 20)] * 3)


def ramp(shape):
    """Return a volume whose three channels are the voxel indices."""
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float32)


def draw(seed, shape=SHAPE, patch=PATCH, target=None, flips=(0, 1, 2), **options):
    return draw_spatial(np.random.default_rng(seed), shape, patch, target, flips, **options)


@given(st.integers(0, 10_000), sizes, sizes)
@settings(max_examples=25)
def test_without_augmentation_a_patch_is_a_copy_of_voxels(seed, shape, patch):
    found = draw(seed, shape, patch, strength=0.0)
    assert torch.equal(found.coordinates, found.coordinates.round())
    inside = found.find_inside(shape)[0].bool()
    nearest = found.sample(ramp(shape), nearest=True).movedim(0, -1)
    linear = found.sample(ramp(shape), nearest=False).movedim(0, -1)
    assert torch.equal(nearest[inside], found.coordinates[inside])
    assert torch.allclose(linear[inside], found.coordinates[inside], atol=1e-4)
    assert torch.allclose(linear[~inside], torch.zeros(()), atol=1e-4)


@given(st.integers(0, 10_000), st.floats(0.0, 1.5))
@settings(max_examples=25)
def test_image_and_label_of_a_patch_see_the_same_geometry(seed, strength):
    found = draw(seed, strength=strength)
    inside = found.find_inside(SHAPE)[0].bool()
    wanted = found.coordinates.clamp(min=torch.zeros(3), max=torch.tensor(SHAPE) - 1.0)
    deep = inside & (found.coordinates == wanted).all(-1)
    linear = found.sample(ramp(SHAPE), nearest=False).movedim(0, -1)
    nearest = found.sample(ramp(SHAPE), nearest=True).movedim(0, -1)
    assert torch.allclose(linear[deep], found.coordinates[deep], atol=1e-3)
    assert (nearest[inside] - found.coordinates[inside]).abs().max() <= 0.5 + 1e-3


@given(st.integers(0, 10_000), st.tuples(*[st.integers(0, n - 1) for n in SHAPE]))
@settings(max_examples=25)
def test_a_patch_without_augmentation_contains_its_target(seed, target):
    found = draw(seed, target=target, strength=0.0)
    distance = (found.coordinates - torch.tensor(target, dtype=torch.float32)).norm(dim=-1)
    assert distance.min() == 0


@pytest.mark.parametrize("seed", range(20))
def test_an_augmented_patch_has_its_target_within_two_voxels(seed):
    found = draw(seed, (40, 40, 40), (16, 16, 16), target=(20, 12, 30))
    distance = (found.coordinates - torch.tensor([20.0, 12.0, 30.0])).norm(dim=-1)
    assert distance.min() < 2


def test_the_same_seed_draws_the_same_patch_and_another_seed_does_not():
    assert torch.equal(draw(5).coordinates, draw(5).coordinates)
    assert not torch.equal(draw(5).coordinates, draw(6).coordinates)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_only_the_axes_that_may_be_mirrored_are(axis):
    flipped = set()
    for seed in range(40):
        steps = draw(seed, flips=(axis,), strength=0.0).coordinates
        ends = steps[-1, -1, -1] - steps[0, 0, 0]
        flipped.add(tuple((ends < 0).tolist()))
    never = (False, False, False)
    mirrored = tuple(other == axis for other in range(3))
    assert flipped == {never, mirrored}


def test_what_may_be_mirrored_does_not_change_where_the_patch_is_cut():
    with_flips, without = draw(3, strength=0.0), draw(3, strength=0.0, flips=())
    means = [d.coordinates.flatten(0, 2).mean(0) for d in (with_flips, without)]
    assert torch.allclose(*means)


def test_rotations_are_rigid_in_mm():
    spacing = torch.tensor([1.0, 1.0, 4.0])
    seen = 0
    for seed in range(60):
        found = draw(seed, (60, 60, 20), (12, 12, 4), strength=1.0, spacing=spacing.tolist())
        moved = found.coordinates * spacing
        edges = [moved[1:, 0, 0] - moved[:-1, 0, 0], moved[0, 0, 1:] - moved[0, 0, :-1]]
        lengths = torch.cat([edges[0].norm(dim=-1), edges[1].norm(dim=-1) / 4])
        is_turned = edges[0][0, 2].abs() > 1e-3
        is_rigid = (lengths - 1).abs().max() < 1e-3
        seen += int(is_turned and is_rigid)
    assert seen > 5


def test_scales_stay_in_their_range():
    steps = []
    for seed in range(200):
        coordinates = draw(seed, (40, 40, 40), (8, 8, 8)).coordinates
        steps.append((coordinates[1:, 4, 4] - coordinates[:-1, 4, 4]).norm(dim=-1).mean())
    assert 0.55 < min(steps) < 0.85
    assert 1.2 < max(steps) < 1.7


def test_padding_is_zero_and_has_no_weight():
    found = draw(0, (4, 4, 4), (12, 12, 12), strength=0.0)
    ones = found.sample(np.ones((1, 4, 4, 4), np.float32), nearest=False)
    inside = found.find_inside((4, 4, 4))
    assert inside.sum() == 64
    assert torch.equal(ones, inside)


def test_a_slice_is_not_smeared_along_the_axis_that_it_lacks():
    found = draw(0, (6, 6, 1), (6, 6, 5), strength=0.0)
    patch = found.sample(np.ones((1, 6, 6, 1), np.float32), nearest=False)
    assert torch.equal(patch, found.find_inside((6, 6, 1)))


def test_a_patch_beside_the_volume_is_empty():
    axes = [torch.arange(3.0) + 50] * 3
    found = SpatialDraw(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1))
    assert not found.sample(np.ones((1, 5, 5, 5), np.float32), nearest=False).any()
    assert not found.find_inside((5, 5, 5)).any()


def test_only_the_part_of_a_volume_that_a_patch_needs_is_read(tmp_path):
    class Watched(np.ndarray):
        read = 0

        def __getitem__(self, key):
            part = np.ndarray.__getitem__(self, key)
            Watched.read += np.asarray(part).size
            return np.asarray(part)

    volume = np.zeros((1, 50, 50, 50), np.float32).view(Watched)
    draw(0, (50, 50, 50), (6, 6, 6), target=(25, 25, 25)).sample(volume, nearest=True)
    assert 6**3 <= Watched.read < 20**3


@given(st.integers(0, 10_000), st.floats(0.0, 1.5))
@settings(max_examples=15)
def test_an_extra_that_moves_nothing_leaves_every_bit(seed, strength):
    still = (np.eye(3), np.zeros(3))
    found = draw(seed, strength=strength, extra=still)
    assert torch.equal(found.coordinates, draw(seed, strength=strength).coordinates)


def test_an_extra_turns_the_patch_about_its_centre_and_then_shifts_it():
    plain = draw(4, (30, 30, 30), strength=0.0, flips=()).coordinates
    centre = plain.flatten(0, 2).mean(0)
    turn = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    shift = np.array([0.25, 0.0, -0.5])  # of a patch of 8 voxels
    found = draw(4, (30, 30, 30), strength=0.0, flips=(), extra=(turn, shift)).coordinates
    expected = (plain - centre) @ torch.tensor(turn.T, dtype=torch.float32) + centre
    assert torch.allclose(found, expected + torch.tensor([2.0, 0.0, -4.0]), atol=1e-4)


def test_an_extra_follows_what_was_drawn():
    turn = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    for seed in range(8):
        before = draw(seed, strength=0.3).coordinates
        after = draw(seed, strength=0.3, extra=(turn, np.zeros(3))).coordinates
        edges = [c[1, 1, 1] - c[0, 0, 0] for c in (before, after)]
        bent = (before[2, 2, 2] - before[1, 1, 1] - edges[0]).abs().max() > 1e-4
        turned = torch.tensor(turn, dtype=torch.float32) @ edges[0]
        assert bent or torch.allclose(edges[1], turned, atol=1e-4)


def make_ball(shape=(24, 20, 16), center=(12, 10, 8), radius=5.0):
    axes = torch.meshgrid(*(torch.arange(n).float() for n in shape), indexing="ij")
    distance = sum((axis - c) ** 2 for axis, c in zip(axes, center, strict=True)).sqrt()
    return (radius - distance).clamp(0, 1)[None, None]


@pytest.mark.parametrize("slice_axis", [None, 0, 2])
def test_a_turn_and_its_inverse_bring_a_volume_back(slice_axis):
    volume = make_ball()
    for seed in range(5):
        rng = np.random.default_rng(seed)
        matrix = draw_turn(rng, (0,), slice_axis, (1.0, 1.0, 2.0))
        turned = turn_volume(volume, matrix, "zeros")
        back = turn_volume(turned, np.linalg.inv(matrix), "zeros")
        assert (back - volume).abs().mean() < 0.02
        assert (turned - volume).abs().max() > 0.05


def test_a_turn_leaves_slices_where_they_are():
    for seed in range(20):
        matrix = draw_turn(np.random.default_rng(seed), (), 2, (1.0, 1.0, 5.0))
        assert np.allclose(matrix[2], [0, 0, 1])
        assert np.allclose(matrix[:, 2], [0, 0, 1])


def test_a_turn_is_rigid_in_mm_up_to_its_scale_and_mirroring():
    spacing = np.diag([1.0, 2.0, 3.0])
    signs = set()
    for seed in range(40):
        matrix = draw_turn(np.random.default_rng(seed), (0,), None, (1.0, 2.0, 3.0))
        rigid = spacing @ matrix @ np.linalg.inv(spacing)
        product = rigid @ rigid.T
        scale = product[0, 0]
        assert np.allclose(product, scale * np.eye(3), atol=1e-9)
        assert 1 / 1.1**2 - 1e-9 <= scale <= 1.1**2 + 1e-9
        signs.add(np.sign(np.linalg.det(rigid)))
    assert signs == {-1.0, 1.0}


def test_a_mirroring_is_the_flip_of_the_volume():
    volume = torch.rand(1, 2, 5, 6, 7)
    matrix = np.diag([-1.0, 1.0, -1.0])
    assert torch.allclose(turn_volume(volume, matrix, "zeros"), volume.flip(2, 4), atol=1e-5)


@pytest.mark.parametrize("outside", ["border", "zeros"])
def test_a_box_is_turned_about_its_own_center(outside):
    volume = torch.rand(2, 3, 17, 16, 14)
    box = (slice(6, 15), slice(0, 7), slice(3, 4))  # its center is that of no other box below
    matrix = draw_turn(np.random.default_rng(1), (0, 2), None, (1.0, 1.0, 2.0))
    center = np.array([10.0, 3.0, 3.0])
    offsets = np.stack(np.meshgrid(np.arange(-4, 5), np.arange(-3, 4), [0], indexing="ij"))
    places = np.einsum("ab,bijk->aijk", matrix, offsets) + center[:, None, None, None]
    mode = "nearest" if outside == "border" else "constant"
    turned = turn_volume(volume, matrix, outside, box)
    for expected, found in zip(volume.flatten(0, 1), turned.flatten(0, 1), strict=True):
        sampled = ndimage.map_coordinates(expected.numpy(), places, order=1, mode=mode)
        inside = (
            (places >= 0) & (places <= np.array(expected.shape)[:, None, None, None] - 1)
        ).all(0)
        where = slice(None) if outside == "border" else inside
        assert np.allclose(sampled[where], found.numpy()[where], atol=1e-4)
