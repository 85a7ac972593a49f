import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.transforms.mixing import draw_cubes, paste


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(0, 1000), st.tuples(*[st.integers(1, 15)] * 3))
@settings(max_examples=50, deadline=None)
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


def test_no_patch_gets_a_cube_at_probability_zero_and_half_of_them_at_a_half():
    assert not draw_cubes(20, (6, 6, 6), generator(), probability=0.0).any()
    chosen = draw_cubes(400, (3, 3, 3), generator(), probability=0.5).flatten(1).any(1)
    assert 160 < chosen.sum() < 240


def test_cubes_are_drawn_by_the_generator_alone():
    first = draw_cubes(3, (9, 9, 9), generator(1), probability=1.0)
    torch.manual_seed(99)
    assert torch.equal(first, draw_cubes(3, (9, 9, 9), generator(1), probability=1.0))
    assert not torch.equal(first, draw_cubes(3, (9, 9, 9), generator(2), probability=1.0))


def test_the_number_of_draws_does_not_depend_on_who_gets_a_cube():
    ends = []
    for probability in (0.0, 1.0):
        source = generator(4)
        draw_cubes(5, (7, 7, 7), source, probability)
        ends.append(torch.rand(1, generator=source))
    assert torch.equal(*ends)


def test_a_paste_shows_the_source_inside_and_the_patch_outside():
    cubes = draw_cubes(2, (6, 6, 6), generator(), probability=1.0)
    into, source = torch.zeros(2, 3, 6, 6, 6), torch.ones(2, 3, 6, 6, 6)
    mixed = paste(into, source, cubes)
    assert torch.equal(mixed, cubes.expand_as(mixed).float())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_a_paste_keeps_the_dtype_of_maps_and_images(dtype):
    cubes = draw_cubes(1, (4, 4, 4), generator(), probability=1.0)
    ones = torch.ones(1, 1, 4, 4, 4).to(dtype)
    assert paste(torch.zeros_like(ones), ones, cubes).dtype == dtype
