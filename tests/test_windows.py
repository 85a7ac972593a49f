import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from medssl.transforms.geometry import Box
from medssl.windows import Window, align_slabs, slide_window

WINDOWS = [
    Window((8, 8, 8)),
    Window((8, 12, 6)),
    Window((16, 4, 10)),
    Window((8, 8), slice_axis=2),
    Window((6, 10), slice_axis=0),
]
SHAPES = [(20, 17, 13), (5, 4, 3), (9, 9, 40)]
MIRRORED = [(), (0,), (0, 1, 2)]


@pytest.fixture
def image(request):
    return torch.randn(1, 2, *request.param, generator=torch.Generator().manual_seed(0))


def build(window):
    torch.manual_seed(0)
    return (nn.Conv3d if window.slice_axis is None else nn.Conv2d)(2, 3, 3, padding=1)


def blend_as_monai(network, image, window, mirrored):
    axes = [2 + axis for axis in mirrored]
    seen, at_once, normal = image.flip(axes), 1, window.slice_axis
    if normal is not None:
        seen, at_once = seen[0].movedim(1 + normal, 0), 8
    with torch.no_grad():
        logits = sliding_window_inference(
            seen, window.patch_size, at_once, network, overlap=0.5, mode="gaussian"
        )
    if normal is not None:
        logits = logits.movedim(0, 1 + normal)[None]
    return logits.flip(axes)[0]


@pytest.mark.parametrize("mirrored", MIRRORED, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("image", SHAPES, ids=str, indirect=True)
def test_slabs_are_what_monai_blends_of_the_whole_and_of_any_box(image, window, mirrored):
    network, shape = build(window), image.shape[2:]
    whole = blend_as_monai(network, image, window, mirrored)
    boxes: list[Box | None] = [
        None,
        (slice(1, shape[0] - 1), slice(0, 2), slice(shape[2] // 3, shape[2])),
    ]
    for box in boxes:
        told: list[int] = []
        slabs = slide_window(network, image, window, mirrored, box, told.append)
        found = torch.cat(list(slabs), dim=1 + window.find_axis(shape))
        expected = whole if box is None else whole[(slice(None), *box)]
        assert torch.allclose(found, expected, atol=1e-5)
        if not mirrored:
            assert sum(told) == window.count_windows(shape, box)


@pytest.mark.parametrize("image", [(9, 9, 40)], indirect=True)
def test_slabs_leave_as_soon_as_they_are_complete(image):
    window = Window((8, 8, 8))
    told: list[int] = []
    first = next(slide_window(build(window), image, window, advance=told.append))
    assert first.shape == (3, 9, 9, 4)
    assert sum(told) == 4 < window.count_windows((9, 9, 40))


@pytest.mark.parametrize("image", [(21, 9, 8)], indirect=True)
def test_views_whose_windows_begin_elsewhere_meet_on_the_same_planes(image):
    window = Window((8, 8, 8))
    network = build(window)
    views = [slide_window(network, image, window, axes) for axes in ((), (0,))]
    plain, mirrored = (torch.cat(parts, 1) for parts in zip(*align_slabs(views, 0), strict=True))
    assert torch.equal(plain, torch.cat(list(slide_window(network, image, window)), 1))
    assert torch.equal(mirrored, torch.cat(list(slide_window(network, image, window, (0,))), 1))


def test_logits_that_are_not_finite_are_refused():
    window = Window((4, 4, 4))
    network = build(window)
    with torch.no_grad():
        network.bias[1] = float("inf")
    with pytest.raises(FloatingPointError, match="not finite"):
        next(slide_window(network, torch.zeros(1, 2, 8, 8, 8), window))


def test_a_scan_is_cut_into_as_few_parts_as_fit():
    window = Window((64, 64, 64))
    shape = (768, 768, 576)
    one = window.count_bytes(shape, 5, 1)
    assert window.choose_parts(shape, 5, 1, one) == 1
    assert window.choose_parts(shape, 5, 1, one - 1) == 2
    assert window.choose_parts(shape, 5, 8, one) == 4
    assert window.choose_parts(shape, 5, 8, 0) == 64
