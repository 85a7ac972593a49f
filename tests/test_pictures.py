import re

import numpy as np
import pytest
from PIL import Image

from medssl.config import DataSection, InputError
from medssl.data.cache import build_cache
from medssl.data.cases import read_dataset, split_cases
from medssl.data.check import check_dataset
from medssl.data.formats import Case
from medssl.data.io import read_geometry, read_image, read_label, write_map, write_mask
from medssl.data.phantoms import make_phantom, write_pictures
from medssl.data.pictures import count_channels
from medssl.predict import find_scans
from medssl.transforms.preprocess import Normalization, Preprocessing

RECIPE = Preprocessing(spacing=(1.0, 1.0, None), normalization=(Normalization(kind="zscore"),))


def draw(shape=(5, 7), dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, 250, shape).astype(dtype)


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def save_pages(path, pages):
    first, *others = (Image.fromarray(page) for page in pages)
    first.save(path, save_all=True, append_images=others)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
def test_rows_are_i_and_columns_are_j_from_the_upper_left(tmp_path, suffix, dtype):
    array = draw(dtype=dtype)
    path = save(tmp_path / f"a{suffix}", array)
    volume = read_image([path], 1)
    assert volume.array.shape == (1, 5, 7, 1)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array[0, ..., 0], array)
    np.testing.assert_array_equal(volume.affine, np.eye(4))
    assert not volume.has_spacing
    assert read_geometry(path)[0] == (5, 7, 1)


def test_the_pages_of_a_tiff_are_slices(tmp_path):
    pages = [draw(seed=seed) for seed in range(3)]
    volume = read_image([save_pages(tmp_path / "a.tiff", pages)], 1)
    np.testing.assert_array_equal(volume.array[0], np.stack(pages, -1))
    assert read_geometry(tmp_path / "a.tiff")[0] == (5, 7, 3)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_colours_are_channels(tmp_path, suffix):
    array = draw((5, 7, 3))
    path = save(tmp_path / f"a{suffix}", array)
    assert count_channels(path) == 3
    np.testing.assert_array_equal(read_image([path], 3).array[..., 0], np.moveaxis(array, -1, 0))
    with pytest.raises(InputError, match=r"\(5, 7, 3\).*declared are 1 channels"):
        read_image([path], 1)


def test_a_gray_picture_saved_in_colour_is_gray_where_one_channel_is_declared(tmp_path):
    array = draw()
    for name, mode in (("rgb", "RGB"), ("rgba", "RGBA"), ("la", "LA"), ("p", "P")):
        found = read_image([save(tmp_path / f"{name}.png", array, mode)], 1).array
        np.testing.assert_array_equal(found[0, ..., 0], array)


def test_a_jpeg_is_read_and_one_that_viewers_turn_is_refused(tmp_path):
    path = save(tmp_path / "a.jpg", np.full((16, 24), 77, np.uint8))
    assert abs(read_image([path], 1).array - 77).max() <= 1
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = save(tmp_path / "b.jpg", draw(), exif=exif)
    with pytest.raises(InputError, match=r"b\.jpg: its orientation tag \(6\).*upright"):
        read_image([turned], 1)


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    whole = save(tmp_path / "b.png", draw((60, 60)))
    whole.write_bytes(whole.read_bytes()[:800])
    clear = np.dstack([draw((5, 7, 3)), draw()])
    save(tmp_path / "c.png", clear)
    for name, words in (("a", "cannot be read"), ("b", "cannot be read"), ("c", "transparent")):
        with pytest.raises(InputError, match=rf"{name}\.png: .*{words}"):
            read_image([tmp_path / f"{name}.png"], 3 if name == "c" else 1)
    with pytest.raises(InputError, match="no such file"):
        read_image([tmp_path / "none.png"], 1)


def test_label_values_are_grey_values_or_indices_of_a_palette(tmp_path):
    array = np.array([[0, 255, 7]], np.uint8)
    for path in (save(tmp_path / "a.png", array), save(tmp_path / "a.tif", array)):
        classes, _ = read_label(path, (0, 255), 7)
        assert classes.ravel().tolist() == [0, 1, 255]
    palette = Image.fromarray(np.array([[0, 2, 1]], np.uint8), mode="P")
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    palette.save(tmp_path / "p.png")
    assert read_label(tmp_path / "p.png", (0, 1, 2), None)[0].ravel().tolist() == [0, 2, 1]
    with pytest.raises(InputError, match=r"label values \[255\]"):
        read_label(tmp_path / "a.png", (0, 7), None)


def test_labels_in_colour_and_as_jpeg_are_refused(tmp_path):
    with pytest.raises(InputError, match="one class value a pixel"):
        read_label(save(tmp_path / "a.png", draw((5, 7, 3))), (0, 1), None)
    with pytest.raises(InputError, match="save labels as PNG or TIFF"):
        read_label(save(tmp_path / "a.jpg", draw()), (0, 1), None)


@pytest.mark.parametrize("label_values", [(0, 1, 2), (0, 255, 128), (0, 300, 4)])
@pytest.mark.parametrize(("suffix", "pages"), [(".png", 1), (".tif", 1), (".tiff", 3)])
def test_a_mask_round_trips_with_its_values_shape_and_orientation(
    tmp_path, suffix, pages, label_values
):
    classes = np.random.default_rng(0).integers(0, 3, (4, 6, pages)).astype(np.uint8)
    path = tmp_path / f"mask{suffix}"
    write_mask(path, classes, np.eye(4), label_values)
    np.testing.assert_array_equal(read_label(path, label_values, None)[0], classes)
    first = np.asarray(Image.open(path))  # as any other program sees it
    np.testing.assert_array_equal(first, np.array(label_values)[classes[..., 0]])
    assert list(tmp_path.iterdir()) == [path]


def test_a_map_of_classes_is_a_tiff_of_a_page_for_each_class_and_slice(tmp_path):
    array = np.random.default_rng(0).random((4, 5, 2, 3)).astype(np.float32)
    write_map(tmp_path / "map.tiff", array, np.eye(4))
    found = read_image([tmp_path / "map.tiff"], 1).array[0]
    np.testing.assert_array_equal(found.reshape(4, 5, 3, 2), np.moveaxis(array, -1, 2))


def test_what_a_format_cannot_hold_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="cannot hold"):
        write_mask(tmp_path / "a.png", np.zeros((3, 3, 2), np.uint8), np.eye(4), (0, 1))
    with pytest.raises(ValueError, match="cannot hold"):
        write_mask(tmp_path / "a.png", np.ones((3, 3, 1), np.uint8), np.eye(4), (0, 70_000))


def test_a_folder_of_pictures_is_read_with_its_colours_and_nifti_wins_over_previews(tmp_path):
    save(tmp_path / "images" / "a.jpg", draw((8, 8, 3)))
    save(tmp_path / "images" / "b.png", draw((8, 8, 3)))
    save(tmp_path / "labels" / "a.png", draw((8, 8)) % 2)
    save(tmp_path / "unlabeled" / "c.tif", draw((8, 8, 3)))
    dataset = read_dataset(tmp_path)
    assert dataset.channels == ("red", "green", "blue")
    assert [c.case_id for c in dataset.cases] == ["a", "b", "c"]
    assert [c.label is not None for c in dataset.cases] == [True, False, False]
    (tmp_path / "images" / "a.nii.gz").touch()
    (tmp_path / "labels" / "a.nii.gz").touch()
    (tmp_path / "unlabeled" / "c.tif").unlink()
    scan = read_dataset(tmp_path)
    assert [c.images[0].name for c in scan.cases] == ["a.nii.gz"]
    assert scan.channels == ("",)


def test_nifti_and_pictures_in_one_list_are_refused(tmp_path):
    save(tmp_path / "a.png", draw())
    (tmp_path / "b.nii.gz").touch()
    (tmp_path / "cases.csv").write_text("case_id,image\na,a.png\nb,b.nii.gz\n")
    with pytest.raises(InputError, match="are mixed"):
        read_dataset(tmp_path)


def test_the_check_counts_in_pixels_and_offers_to_name_255(tmp_path):
    write_pictures(tmp_path, 2, 1, 0, shape=(24, 28), label_values=(0, 255, 255, 255))
    dataset = read_dataset(tmp_path)
    result = check_dataset(dataset, split_cases(dataset, DataSection(), "auto"))
    (problem,) = result.problems
    assert "label value 255 is not declared" in problem
    assert "data.labels.255=name" in problem
    named = read_dataset(tmp_path, labels={255: "organ"})
    text = check_dataset(named, split_cases(named, DataSection(), "auto")).render()
    assert "median px" in text
    assert "rows (I), pixels" in text
    assert not re.search(r"\bmm\b|\bml\b|spacing", text)
    assert text.endswith("OK")


def test_a_label_of_another_size_is_a_problem_of_the_check(tmp_path):
    write_pictures(tmp_path, 1, 0, 0, shape=(24, 28))
    save(tmp_path / "labels" / "organs_000.png", np.zeros((28, 24), np.uint8))
    dataset = read_dataset(tmp_path)
    result = check_dataset(dataset, split_cases(dataset, DataSection(), "auto"))
    assert "(24, 28, 1), its label" in result.problems[0]


def test_a_picture_is_cached_as_one_slice_on_the_identity_with_no_spacing(tmp_path):
    path = save(tmp_path / "a.jpg", draw((16, 24)))
    label = save(tmp_path / "a.png", (draw((16, 24)) > 120).astype(np.uint8))
    case = Case("a", (path,), label, "a")
    found = build_cache([case], RECIPE, tmp_path / "cache", (0, 1), None, 1)["a"]
    assert found.shape == found.native_shape == (16, 24, 1)
    np.testing.assert_array_equal(found.affine, np.eye(4))
    assert (found.has_spacing, found.mask_suffix) == (False, ".png")
    np.testing.assert_array_equal(found.label()[..., 0], np.asarray(Image.open(label)))


def test_numbered_pictures_in_colour_are_scans_of_their_own(tmp_path):
    for name in ("frame_0000", "frame_0001"):
        save(tmp_path / f"{name}.png", draw((8, 8, 3)))
    assert sorted(find_scans([tmp_path], 3)) == ["frame_0000", "frame_0001"]


def test_pictures_of_phantoms_show_the_slice_whose_classes_their_labels_hold(tmp_path):
    write_pictures(tmp_path, 1, 1, 0, shape=(40, 48), label_values=(0, 10, 20, 30))
    scan, classes = make_phantom(0, 0, (40, 48, 12), "organs")
    k = int(np.argmax((classes > 0).sum((0, 1))))
    label = np.asarray(Image.open(tmp_path / "labels" / "organs_000.png"))
    np.testing.assert_array_equal(label, 10 * classes[..., k])
    picture = np.asarray(Image.open(tmp_path / "images" / "organs_000.png"))
    assert np.corrcoef(picture.ravel(), scan[..., k].ravel())[0, 1] > 0.999
    assert not (tmp_path / "labels" / "organs_001.png").exists()
