import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.transforms.mixing import draw_boxes, draw_cubes, paste

both = pytest.mark.parametrize("draw", [draw_cubes, draw_boxes])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(0, 1000), st.tuples(*[st.integers(1, 15)] * 3))
@settings(max_examples=50)
def test_a_cube_has_two_thirds_of_each_side_and_lies_in_the_patch(seed, size):
    (cube,) = draw_cubes(1, size, generator(seed), probability=1.0)
    expected = 1
    for axis, side in enumerate(size):
        others = [other for other in range(3) if other != axis]
        along = cube[0].any(others[1]).any(others[0])
        length = max(1, round(2 / 3 * side))
        assert along.sum() == length
        expected *= length
    assert cube.sum() == expected


@both
def test_no_patch_gets_one_at_probability_zero_and_half_of_them_at_a_half(draw):
    assert not draw(20, (6, 6, 6), generator(), probability=0.0).any()
    chosen = draw(400, (3, 3, 3), generator(), probability=0.5).flatten(1).any(1)
    assert 160 < chosen.sum() < 240


@both
def test_they_are_drawn_by_the_generator_alone(draw):
    first = draw(3, (9, 9, 9), generator(1), probability=1.0)
    torch.manual_seed(99)
    assert torch.equal(first, draw(3, (9, 9, 9), generator(1), probability=1.0))
    assert not torch.equal(first, draw(3, (9, 9, 9), generator(2), probability=1.0))


@both
def test_the_number_of_draws_does_not_depend_on_who_gets_one(draw):
    ends = []
    for probability in (0.0, 1.0):
        source = generator(4)
        draw(5, (7, 7, 7), source, probability)
        ends.append(torch.rand(1, generator=source))
    assert torch.equal(*ends)


@both
@pytest.mark.parametrize("size", [(6, 6), (6, 6, 6)])
def test_a_paste_shows_the_source_inside_and_the_patch_outside(draw, size):
    parts = draw(2, size, generator(), probability=1.0)
    mixed = paste(torch.zeros(2, 3, *size), torch.ones(2, 3, *size), parts)
    assert torch.equal(mixed, parts.expand_as(mixed).float())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_a_paste_keeps_the_dtype_of_maps_and_images(dtype):
    cubes = draw_cubes(1, (4, 4, 4), generator(), probability=1.0)
    ones = torch.ones(1, 1, 4, 4, 4).to(dtype)
    assert paste(torch.zeros_like(ones), ones, cubes).dtype == dtype


def measure_sides(box):
    return [int(box.movedim(axis, 0).flatten(1).any(1).sum()) for axis in range(box.ndim)]


def test_cubes_are_squares_in_2d():
    (cube,) = draw_cubes(1, (9, 6), generator(), probability=1.0)
    assert cube.shape == (1, 9, 6)
    assert measure_sides(cube[0]) == [6, 4]
    assert cube.sum() == 24


@given(st.integers(0, 1000), st.lists(st.integers(1, 12), min_size=2, max_size=3))
@settings(max_examples=50)
def test_a_box_is_full_and_has_the_same_fraction_of_each_side(seed, size):
    (box,) = draw_boxes(1, tuple(size), generator(seed), probability=1.0)
    sides = measure_sides(box[0])
    assert box.sum() == torch.tensor(sides).prod()
    pairs = list(zip(sides, size, strict=True))
    lowest = max(0.0 if side == 1 else (side - 0.5) / n for side, n in pairs)  # 1 is the least
    assert lowest <= min((side + 0.5) / n for side, n in pairs)


@pytest.mark.parametrize("size", [(40, 40), (16, 16, 16)])
def test_the_volume_of_boxes_has_the_moments_of_their_beta_distribution(size):
    boxes = draw_boxes(1500, size, generator(3), probability=1.0)
    shares = boxes.flatten(1).float().mean(1)
    assert shares.mean().item() == pytest.approx(0.5, abs=0.015)
    assert shares.std().item() == pytest.approx(1 / 6, abs=0.01)  # Beta(4, 4): 1 / (4 (2 4 + 1))


def test_boxes_lie_everywhere_in_the_patch():
    boxes = draw_boxes(300, (8, 8, 8), generator(), probability=1.0)
    assert boxes.any(0).all()
    assert not boxes.all(0).all()


def test_two_batches_of_one_generator_have_boxes_of_other_sizes():
    source = generator()
    first, second = (draw_boxes(4, (40, 40), source, probability=1.0) for _ in range(2))
    assert not torch.equal(first.flatten(1).sum(1), second.flatten(1).sum(1))
