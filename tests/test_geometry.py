import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medssl.transforms.geometry import (
    Volume,
    WayBack,
    cache_grid,
    grid_spacing,
    measure_displacement,
    resample,
    to_native,
)


def make_affine(order=(0, 1, 2), signs=(1, 1, 1), spacing=(1, 1, 1), angles=(0, 0, 0), origin=0):
    """Return an affine whose voxel axes point along reordered, flipped, turned world axes."""
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ (np.eye(3)[:, list(order)] * signs * spacing)
    affine[:3, 3] = origin
    return affine


affines = st.builds(
    make_affine,
    order=st.permutations((0, 1, 2)),
    signs=st.tuples(*[st.sampled_from((-1, 1))] * 3),
    spacing=st.tuples(*[st.floats(0.3, 5)] * 3),
    angles=st.tuples(*[st.floats(-40, 40)] * 3),
    origin=st.floats(-200, 200),
)
shapes = st.tuples(*[st.integers(1, 9)] * 3)


def world_corners(shape, affine):
    """Return the outer corners (8, 3) of the field of view in mm."""
    ends = np.array(np.meshgrid(*[(-0.5, size - 0.5) for size in shape])).reshape(3, -1)
    return (affine[:3, :3] @ ends + affine[:3, 3:]).T


@given(shape=shapes, affine=affines, spacing=st.tuples(*[st.floats(0.3, 5)] * 3))
def test_the_cache_grid_covers_the_scan_from_the_same_center(shape, affine, spacing):
    grid_shape, grid = cache_grid(shape, affine, spacing)
    np.testing.assert_allclose(grid_spacing(grid), spacing, rtol=1e-9)
    np.testing.assert_allclose(
        world_corners(grid_shape, grid).mean(0), world_corners(shape, affine).mean(0), atol=1e-6
    )
    inside = np.linalg.solve(grid, np.c_[world_corners(shape, affine), np.ones(8)].T)[:3].T
    assert (inside >= -0.5 - 0.06).all()
    assert (inside <= np.asarray(grid_shape) - 0.5 + 0.06).all()
    assert min(grid_shape) >= 1


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (-1, 1, -1), (-1, -1, -1)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_the_axes_of_the_cache_grid_point_right_anterior_superior(order, signs):
    affine = make_affine(order, signs, (0.8, 1.2, 3), (12, -20, 15))
    _, grid = cache_grid((5, 6, 7), affine, (1, 2, 3))
    assert nib.aff2axcodes(grid) == ("R", "A", "S")


@given(shape=shapes, affine=affines, seed=st.integers(0, 9))
def test_the_own_spacing_moves_voxels_there_and_back_without_changing_a_bit(shape, affine, seed):
    array = np.random.default_rng(seed).random((2, *shape), dtype=np.float32)
    order = np.argsort(nib.orientations.io_orientation(affine)[:, 0])
    spacing = tuple(np.asarray(grid_spacing(affine))[order])
    grid_shape, grid = cache_grid(shape, affine, spacing)
    assert sorted(grid_shape) == sorted(shape)
    there = resample(array, affine, grid_shape, grid, "linear")
    np.testing.assert_array_equal(to_native(there, grid, shape, affine), array)


@settings(max_examples=50)
@given(
    affine=affines,
    gradient=st.tuples(*[st.floats(-1, 1)] * 3),
    spacing=st.tuples(*[st.floats(0.5, 3)] * 3),
)
def test_a_linear_ramp_in_the_world_is_sampled_exactly_inside(affine, gradient, spacing):
    """Any shift by a fraction of a voxel, align_corners or half-voxel, would show here."""
    shape = (7, 8, 9)

    def measure_ramp(shape, affine):
        grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
        return (grid @ affine[:3, :3].T + affine[:3, 3]) @ gradient

    ramp = measure_ramp(shape, affine)
    grid_shape, grid = cache_grid(shape, affine, spacing)
    found = resample(ramp[None], affine, grid_shape, grid, "linear")[0]
    voxels = np.stack(np.meshgrid(*map(np.arange, grid_shape), indexing="ij"), -1)
    matrix = np.linalg.solve(affine, grid)
    where = voxels @ matrix[:3, :3].T + matrix[:3, 3]
    inside = ((where >= 0) & (where <= np.asarray(shape) - 1)).all(-1)
    np.testing.assert_allclose(found[inside], measure_ramp(grid_shape, grid)[inside], atol=1e-6)


def test_half_the_spacing_puts_two_voxels_symmetrically_into_each():
    array = np.arange(4.0)[None, :, None, None]
    grid_shape, grid = cache_grid((4, 1, 1), np.eye(4), (0.5, 1, 1))
    found = resample(array, np.eye(4), grid_shape, grid, "linear")[0, :, 0, 0]
    np.testing.assert_allclose(found, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


def test_resampling_agrees_with_monai():
    torch = pytest.importorskip("torch")
    from monai.data import MetaTensor
    from monai.transforms import SpatialResample

    array = np.random.default_rng(0).random((2, 9, 8, 7), dtype=np.float32)
    affine = make_affine((1, 0, 2), (-1, 1, 1), (1, 1.5, 2), (10, 20, 30), 7)
    to_affine = make_affine(spacing=(1.3, 0.9, 1.1), angles=(5, -8, 3), origin=4)
    oracle = SpatialResample(mode="bilinear", padding_mode="border", align_corners=True)(
        MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(affine)),
        dst_affine=torch.from_numpy(to_affine),
        spatial_size=(8, 9, 10),
    )
    found = resample(array, affine, (8, 9, 10), to_affine, "linear")
    np.testing.assert_allclose(found, oracle.numpy(), atol=2e-5)


def make_box(shape):
    """Return a box phantom (I, J, K): a block across the middle half of every axis."""
    box = np.zeros(shape, dtype=np.uint8)
    box[tuple(slice(size // 4, size - size // 4) for size in shape)] = 1
    return box


@pytest.mark.parametrize(
    ("affine", "shape"),
    [
        (make_affine(), (40, 44, 36)),
        (make_affine(signs=(-1, -1, 1), origin=(90, 120, -30)), (40, 44, 36)),
        (make_affine((2, 0, 1), (1, -1, -1), (0.7, 0.9, 3.3)), (60, 50, 16)),
        (make_affine(angles=(14, -21, 33), spacing=(0.8, 0.8, 2.5)), (56, 48, 20)),
        (make_affine((1, 2, 0), (-1, 1, -1), (1.1, 2.0, 0.6), (-30, 10, 17)), (40, 24, 60)),
    ],
    ids=["plain", "LPS", "reordered", "oblique", "all"],
)
def test_probs_of_a_box_come_back_with_dice_above_99_percent(affine, shape):
    box = make_box(shape)
    grid_shape, grid = cache_grid(shape, affine, (1.0, 1.0, 1.0))
    probs = np.stack([1 - box, box]).astype(np.float32)
    there = resample(probs, affine, grid_shape, grid, "linear")
    back = to_native(there, grid, shape, affine).argmax(0)
    assert back.shape == shape
    assert 2 * (back & box).sum() / (back.sum() + box.sum()) >= 0.99


def test_probs_stay_probs_on_the_way_back():
    affine = make_affine(angles=(10, 20, 30), spacing=(0.8, 1.7, 2.2))
    grid_shape, grid = cache_grid((12, 13, 9), affine, (1, 1, 1))
    probs = np.random.default_rng(0).dirichlet([1, 1, 1], grid_shape).astype(np.float32)
    back = to_native(np.moveaxis(probs, -1, 0), grid, (12, 13, 9), affine)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back.sum(0), 1, atol=1e-5)
    assert back.min() >= 0


@pytest.mark.parametrize("shape", [(1, 9, 8), (9, 1, 8), (9, 8, 1), (1, 1, 1)])
def test_axes_of_one_voxel_do_no_harm(shape):
    affine = make_affine((1, 2, 0), (-1, 1, 1), (5, 1, 1), (9, 5, 2))
    array = np.random.default_rng(0).random((1, *shape), dtype=np.float32)
    for spacing in ((1.0, 1.0, 1.0), (20.0, 20.0, 20.0)):
        grid_shape, grid = cache_grid(shape, affine, spacing)
        there = resample(array, affine, grid_shape, grid, "linear")
        assert np.isfinite(there).all()
        assert to_native(there, grid, shape, affine).shape == array.shape


def test_probs_from_the_grid_of_another_scan_are_refused():
    shape, grid = cache_grid((10, 10, 10), np.eye(4), (1, 1, 1))
    probs = np.zeros((2, *shape), dtype=np.float32)
    with pytest.raises(ValueError, match="not on the cache grid"):
        to_native(probs, grid, (11, 10, 10), np.eye(4))
    with pytest.raises(ValueError, match="not on the cache grid"):
        to_native(probs, grid, (10, 10, 10), make_affine(origin=2))


def test_nearest_neighbor_makes_no_new_values():
    label = np.random.default_rng(0).choice([0, 3, 255], (1, 6, 7, 8)).astype(np.uint8)
    affine = make_affine(angles=(10, 20, 30))
    grid_shape, grid = cache_grid((6, 7, 8), affine, (0.7, 0.8, 1.9))
    found = resample(label, affine, grid_shape, grid, "nearest")
    assert found.dtype == np.uint8
    assert set(np.unique(found)) <= {0, 3, 255}


def test_the_displacement_of_grids_is_in_voxels_of_the_first():
    first = make_affine(spacing=(2, 2, 2))
    assert measure_displacement(first, first, (5, 5, 5)) == pytest.approx(0)
    assert measure_displacement(first, make_affine(spacing=(2, 2, 2), origin=1), (5, 5, 5)) == (
        pytest.approx(np.sqrt(3) / 2)
    )
    stretched = make_affine(spacing=(2.2, 2, 2))
    assert measure_displacement(first, stretched, (11, 5, 5)) == pytest.approx(1.0)


def test_a_volume_knows_its_spacing_and_refuses_what_is_none():
    volume = Volume(np.zeros((1, 2, 3, 4)), make_affine((2, 1, 0), (1, -1, 1), (1, 2, 3)))
    assert volume.spacing == pytest.approx((1, 2, 3))
    assert volume.shape == (2, 3, 4)
    with pytest.raises(ValueError, match="C, I, J, K"):
        Volume(np.zeros((2, 3, 4)), np.eye(4))
    for affine in (np.zeros((4, 4)), np.diag([1, 1, 0, 1.0]), np.diag([1, np.nan, 1, 1])):
        with pytest.raises(ValueError, match="affine"):
            Volume(np.zeros((1, 2, 3, 4)), affine)


@pytest.mark.parametrize("spacing", [(None, None, None), (0.7, 1.3, 0.9), (2.5, 2.5, 2.5)], ids=str)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slab_by_slab_and_part_by_part_the_way_back_is_that_of_the_whole(axis, parts, spacing):
    rng = np.random.default_rng(0)
    affine = make_affine((2, 0, 1), (1, -1, -1), (0.8, 2.0, 1.1), (0, 0, 10), 30)
    shape = (12, 7, 11)
    grid_shape, grid = cache_grid(shape, affine, spacing)
    probs = rng.random((2, *grid_shape)).astype(np.float32)
    way = WayBack(grid_shape, grid, shape, affine)
    native = np.full((2, *shape), np.nan, np.float32)
    for box in way.cut((axis + 1) % 3, parts):
        source = probs[(slice(None), *way.find_source(box))]
        count = source.shape[1 + axis]
        slabs = (source.take(range(s, min(s + 3, count)), 1 + axis) for s in range(0, count, 3))
        for place, values in way.stream(slabs, axis, box):
            native[(slice(None), *place)] = values
    np.testing.assert_allclose(native, resample(probs, grid, shape, affine, "linear"), atol=1e-6)
