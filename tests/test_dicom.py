import contextlib
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless
from series import LPS, NAME, join_frames, make_slices, save

from medssl.config import InputError
from medssl.data.io import find_contradictions, read_image
from medssl.data.layouts import read_dataset
from medssl.formats import dicom
from medssl.formats.dicom import list_series, open_scan, read_modality
from medssl.formats.scan import keep_quiet

ARRAY = np.random.default_rng(0).integers(-100, 2000, (7, 5, 4)).astype(np.int16)
LARGE = np.tile(ARRAY, (10, 10, 1))  # JPEG 2000 takes none of a few pixels
AXIAL = np.array([[-0.7, 0, 0, 12.5], [0, -0.9, 0, 3], [0, 0, 2.5, -40], [0, 0, 0, 1.0]])


def turn(affine, degrees=(20, -35, 10)):
    """Turn a grid around all three axes."""
    for axis, angle in enumerate(np.radians(degrees)):
        rotation = np.eye(4)
        first, second = [other for other in range(3) if other != axis]
        rotation[[first, second], [first, second]] = np.cos(angle)
        rotation[first, second], rotation[second, first] = -np.sin(angle), np.sin(angle)
        affine = rotation @ affine
    return affine


def read(path):
    scan = open_scan(path)
    return np.concatenate(list(scan.iterate_values())).reshape(scan.shape, order="F"), scan


def read_itk(folder):
    """What SimpleITK makes of a series: values (I, J, K) and their affine to RAS+."""
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), LPS @ affine


def refuse(path, *words):
    """Return the message that a path is refused with, which has all of these words."""
    with pytest.raises(InputError) as caught:
        list(open_scan(path).iterate_values())
    message = str(caught.value)
    assert all(word in message for word in words), message
    for secret in ("Avasarala", "Chrisjen", "PGBM", "Holden", "19700101"):
        assert secret.lower() not in message.lower()
    return message


# ---------------------------------------------------------------- a series


@pytest.mark.parametrize("affine", [AXIAL, turn(AXIAL)], ids=["axial", "oblique"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_a_series_lies_where_its_headers_say_in_any_order_of_its_files(tmp_path, affine, order):
    values, scan = read(save(tmp_path, make_slices(ARRAY, affine), order))
    assert scan.shape == (7, 5, 4)
    assert scan.num_channels == 1
    np.testing.assert_array_equal(values, ARRAY - 1000.0)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-5)
    itk, itk_affine = read_itk(tmp_path)
    np.testing.assert_array_equal(values, itk)
    np.testing.assert_allclose(scan.affine, itk_affine, atol=1e-5)


def test_slices_that_are_stored_from_the_head_down_are_counted_along_their_normal(tmp_path):
    downwards = AXIAL @ np.diag([1, 1, -1, 1.0])
    values, scan = read(save(tmp_path, make_slices(ARRAY, downwards)))
    np.testing.assert_array_equal(values, ARRAY[:, :, ::-1] - 1000.0)
    np.testing.assert_allclose(scan.affine[:3, 2], -downwards[:3, 2], atol=1e-5)
    np.testing.assert_allclose(scan.affine[:3, 3], (downwards @ [0, 0, 3, 1])[:3], atol=1e-5)


def test_voxels_are_those_of_highdicom(tmp_path):
    from highdicom import get_volume_from_series

    slices = make_slices(ARRAY, turn(AXIAL))
    values, scan = read(save(tmp_path, slices))
    volume = get_volume_from_series(slices)
    # highdicom counts slices against the normal, and its axes are K, J, I
    np.testing.assert_array_equal(values, volume.array.transpose(2, 1, 0)[:, :, ::-1])
    to_volume = np.array([[0, 0, -1, 3], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    np.testing.assert_allclose(scan.affine, LPS @ volume.affine @ to_volume, atol=1e-4)


def test_each_slice_has_its_own_rescale(tmp_path):
    slices = make_slices(ARRAY, AXIAL)
    for k, image in enumerate(slices):
        image.RescaleSlope, image.RescaleIntercept = f"{0.5 + k}", f"{-10 * k}"
    values, _ = read(save(tmp_path, slices))
    np.testing.assert_allclose(values, ARRAY * (0.5 + np.arange(4)) - 10 * np.arange(4))


def test_values_without_a_rescale_are_the_stored_ones(tmp_path):
    slices = make_slices(ARRAY, AXIAL)
    for image in slices:
        del image.RescaleSlope, image.RescaleIntercept, image.FrameOfReferenceUID
    values, _ = read(save(tmp_path, slices))
    np.testing.assert_array_equal(values, ARRAY)


@pytest.mark.parametrize(
    ("modality", "lost", "expected"),
    [
        ("CT", ["RescaleSlope", "RescaleIntercept"], {"values": ""}),
        ("CT", ["RescaleIntercept"], {"values": ""}),
        ("CT", [], {}),
        ("MR", ["RescaleSlope", "RescaleIntercept"], {}),
    ],
)
def test_a_ct_that_does_not_say_what_its_values_are_is_named(tmp_path, modality, lost, expected):
    slices = make_slices(ARRAY, AXIAL, Modality=modality)
    for image in slices:
        for field in lost:
            delattr(image, field)
    assert find_contradictions(read_image([save(tmp_path, slices)], 1)) == expected


def test_slices_of_which_some_have_lost_their_rescale_are_refused(tmp_path):
    slices = make_slices(ARRAY, AXIAL)
    for image in slices[2:]:
        del image.RescaleIntercept
    refuse(save(tmp_path / "lost", slices), "2 of 4 slices lack", "3.dcm", "1 and -1000 in 1.dcm")
    for image in slices[:2]:
        image.RescaleIntercept = 0  # what is missing means
    np.testing.assert_array_equal(read(save(tmp_path / "harmless", slices))[0], ARRAY)


def test_values_go_through_a_lookup_table(tmp_path):
    slices = make_slices(ARRAY % 4, AXIAL)
    for image in slices:
        del image.RescaleSlope, image.RescaleIntercept
        table = pydicom.Dataset()
        table.add_new("LUTDescriptor", "US", [4, 0, 16])
        table.add_new("LUTData", "US", [7, 90, 5, 1000])
        table.ModalityLUTType = "US"
        image.ModalityLUTSequence = pydicom.Sequence([table])
    values, _ = read(save(tmp_path, slices))
    np.testing.assert_array_equal(values, np.array([7, 90, 5, 1000])[ARRAY % 4])


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_compressed_slices_are_decoded(tmp_path, syntax):
    slices = make_slices(LARGE, AXIAL)
    for image in slices:
        image.compress(syntax, generate_instance_uid=False)
    np.testing.assert_array_equal(read(save(tmp_path, slices))[0], LARGE - 1000.0)


def test_files_without_preamble_and_transfer_syntax_are_read(tmp_path):
    for number, image in enumerate(make_slices(ARRAY, AXIAL)):
        image.file_meta, image.preamble = pydicom.dataset.FileMetaDataset(), None
        path = tmp_path / f"{number}"
        pydicom.dcmwrite(path, image, implicit_vr=False, little_endian=True)
        assert path.read_bytes()[:2] == b"\x08\x00"
    np.testing.assert_array_equal(read(tmp_path)[0], ARRAY - 1000.0)


def test_frames_of_one_file_have_places_and_rescales_of_their_own(tmp_path):
    slices = make_slices(ARRAY, turn(AXIAL))
    for k, image in enumerate(slices):
        image.RescaleSlope = f"{1 + k}"
    path = tmp_path / "enhanced.dcm"
    join_frames([slices[index] for index in (2, 0, 3, 1)]).save_as(path, enforce_file_format=True)
    values, scan = read(path)
    np.testing.assert_array_equal(values, ARRAY * (1.0 + np.arange(4)) - 1000)
    np.testing.assert_allclose(scan.affine, turn(AXIAL), atol=1e-5)
    assert len(scan.header["instances"]) == 1


def test_one_slice_is_as_thick_as_its_header_says(tmp_path):
    slices = make_slices(ARRAY[:, :, :1], AXIAL)
    _, scan = read(save(tmp_path / "a", slices))
    np.testing.assert_allclose(scan.affine, AXIAL, atol=1e-5)
    del slices[0].SliceThickness
    refuse(save(tmp_path / "b", slices), "one slice, and no SliceThickness")


def test_an_archive_is_read_as_its_folder(tmp_path):
    folder = save(tmp_path / "a", make_slices(ARRAY, AXIAL))
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.iterdir():
            file.write(path, f"export/a/{path.name}")
        file.write(path, f"export/a/.{path.name}")
        file.write(path, f"__MACOSX/a/{path.name}")
    shutil.copy(path, folder / f".{path.name}")  # as a program leaves it that was interrupted
    np.testing.assert_array_equal(read(archive)[0], read(folder)[0])
    (series,) = list_series(archive)
    assert series.folder == archive


def test_the_header_holds_the_images_in_order_and_no_name(tmp_path):
    slices = make_slices(ARRAY, AXIAL)
    header = open_scan(save(tmp_path, slices, (2, 0, 3, 1))).header
    assert header == {
        "format": "dicom",
        "path": str(tmp_path),
        "shape": [7, 5, 4],
        "frame_of_reference": slices[0].FrameOfReferenceUID,
        "instances": [image.SOPInstanceUID for image in slices],
    }


def test_values_in_the_upper_bits_are_refused_and_not_read_sixteen_times_too_large(tmp_path):
    save(tmp_path, make_slices(ARRAY, AXIAL, BitsStored=12, HighBit=15))
    refuse(tmp_path, "HighBit is 15, where 12 stored bits end at 11")


# ---------------------------------------------------------------- several series


def test_a_tree_is_listed_without_the_name_of_the_patient(tmp_path):
    save(tmp_path / "ct", make_slices(ARRAY, AXIAL))
    scout = make_slices(ARRAY[:, :, :1], AXIAL, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    save(tmp_path / "scout", scout)
    (color,) = make_slices(ARRAY[:, :, :1], AXIAL, PhotometricInterpretation="RGB")
    color.SamplesPerPixel = 3
    save(tmp_path / "color", [color])
    (tmp_path / "notes.txt").write_text("no DICOM")
    found = {series.folder.name: series for series in list_series(tmp_path)}
    assert {name: series.other for name, series in found.items()} == {
        "ct": "",
        "scout": "a localizer",
        "color": "in color",
    }
    assert found["ct"].shape == (7, 5, 4)
    assert found["ct"].num_images == 4
    assert str(found["ct"]) == f"{found['ct'].uid}  CT 'thorax of ...' 7 x 5 x 4"
    assert open_scan(tmp_path).shape == (7, 5, 4)  # the only one with images


def test_one_of_several_series_is_named_by_the_beginning_of_its_uid(tmp_path):
    first, second = make_slices(ARRAY, AXIAL), make_slices(ARRAY + 1, AXIAL)
    for uid, slices in (("1.2.34", first), ("1.2.345", second)):
        for image in slices:
            image.SeriesInstanceUID = uid
        save(tmp_path / uid, slices)
    message = refuse(tmp_path, "2 image series", f"{tmp_path}#1.2.34", "1.2.345  CT", "7 x 5 x 4")
    assert message.count("\n") == 2
    refuse(Path(f"{tmp_path}#1.2.3"), "2 image series")
    refuse(Path(f"{tmp_path}#7"), "no DICOM image series", "1.2.345  CT")
    values, scan = read(Path(f"{tmp_path}#1.2.345"))
    np.testing.assert_array_equal(values, ARRAY - 999.0)
    assert scan.header["path"] == f"{tmp_path}#1.2.345"
    np.testing.assert_array_equal(read(Path(f"{tmp_path}#1.2.34"))[0], ARRAY - 1000.0)


def test_a_message_does_not_list_a_whole_archive(tmp_path):
    for number in range(33):
        save(tmp_path / f"{number}", make_slices(ARRAY[:, :, :1], AXIAL))
    message = refuse(tmp_path, "33 image series", "and 3 more")
    assert message.count("\n") == 31


# ---------------------------------------------------------------- what is no volume


def spoil(slices, k, **fields):
    for field, value in fields.items():
        setattr(slices[k], field, value)
    return slices


def move(slices, k, x=0.0, y=0.0, z=0.0):
    position = np.add(np.array(slices[k].ImagePositionPatient, dtype=float), (x, y, z))
    slices[k].ImagePositionPatient = [f"{number:.6g}" for number in position]
    return slices


def test_a_missing_slice_is_refused_with_its_place(tmp_path):
    slices = make_slices(np.repeat(ARRAY, 2, 2), AXIAL)
    del slices[5]
    save(tmp_path, slices)
    refuse(tmp_path, "1 slice is missing", "5.00 mm from 5.dcm", "-30.00) to 6.dcm")


def test_an_uneven_gap_is_refused_with_its_place(tmp_path):
    slices = move(make_slices(ARRAY, AXIAL), 3, z=0.7)
    refuse(save(tmp_path, slices), "not evenly spaced", "3.20 mm from 3.dcm", "to 4.dcm")


def test_positions_that_are_rounded_are_no_gap(tmp_path):
    slices = make_slices(ARRAY, AXIAL @ np.diag([1, 1, 0.6 / 2.5, 1]))
    read(save(tmp_path, move(slices, 2, z=0.01)))


def test_two_slices_at_one_position_are_refused(tmp_path):
    slices = move(make_slices(ARRAY, AXIAL), 3, z=-2.5)
    refuse(save(tmp_path, slices), "2 images at the same position", "3.dcm", "4.dcm")


def test_several_times_are_refused_by_what_tells_them_apart(tmp_path):
    slices = make_slices(ARRAY, AXIAL, EchoTime="10")
    again = make_slices(ARRAY, AXIAL, EchoTime="80")
    for image in again:
        image.SeriesInstanceUID = slices[0].SeriesInstanceUID
    refuse(save(tmp_path, slices + again), "2 images at each of 4 positions", "EchoTime")


def test_two_directions_are_refused_with_an_example_of_each(tmp_path):
    turned = spoil(make_slices(ARRAY, AXIAL), 2, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    refuse(save(tmp_path, turned), "2 kinds of slices", "1.dcm", "3.dcm")


def test_two_sizes_of_pixels_are_refused(tmp_path):
    refuse(save(tmp_path, spoil(make_slices(ARRAY, AXIAL), 1, PixelSpacing=[0.9, 0.8])), "2 kinds")


def test_a_tilted_gantry_is_refused_in_mm_and_degrees(tmp_path):
    slices = make_slices(ARRAY, AXIAL, GantryDetectorTilt="-15")
    for k in range(4):
        move(slices, k, y=0.67 * k)
    refuse(save(tmp_path, slices), "tilt", "-15", "0.67 mm", "15.0 degrees")


def test_a_slice_beside_the_others_is_refused(tmp_path):
    refuse(save(tmp_path, move(make_slices(ARRAY, AXIAL), 2, x=0.5)), "3.dcm", "0.50 mm off")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ImageOrientationPatient": [1, 0, 0, 0.5, 1, 0]}, "no two unit vectors"),
        ({"PixelSpacing": None}, "PixelSpacing must be 2 numbers"),
        ({"RescaleSlope": "0"}, "RescaleSlope"),
        ({"PixelSpacing": ["0", "0"]}, "flattens"),
    ],
)
def test_a_header_that_places_no_pixels_is_refused(tmp_path, fields, words):
    refuse(save(tmp_path, make_slices(ARRAY, AXIAL, **fields)), words)


def test_slices_that_lost_their_place_are_refused_and_a_capture_is_passed_over(tmp_path):
    slices = make_slices(ARRAY, AXIAL)
    for image in slices[-2:]:
        del image.ImagePositionPatient
    lost = "2 of 4 images have no ImagePositionPatient, such as 3.dcm, and would be left out"
    refuse(save(tmp_path / "a", slices), lost, "export the series again")
    (capture,) = make_slices(ARRAY[:3, :3, :1], AXIAL)
    del capture.ImagePositionPatient
    values, _ = read(save(tmp_path / "b", [*make_slices(ARRAY, AXIAL), capture]))
    np.testing.assert_array_equal(values, ARRAY - 1000.0)


def test_what_holds_no_series_is_refused_by_what_it_holds(tmp_path):
    refuse(tmp_path / "nothing", "there is no such file or folder")
    (tmp_path / "notes.dcm").write_text("no DICOM")
    refuse(tmp_path, "no DICOM image series", "no other DICOM file")
    scout = make_slices(ARRAY, AXIAL, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    refuse(save(tmp_path / "scout", scout), "no image: a localizer")


@pytest.mark.parametrize("syntax", [None, JPEG2000Lossless])
def test_a_cut_file_is_refused_by_its_name(tmp_path, syntax):
    slices = make_slices(LARGE, AXIAL)
    if syntax:
        for image in slices:
            image.compress(syntax, generate_instance_uid=False)
    path = save(tmp_path, slices) / "3.dcm"
    os.truncate(path, path.stat().st_size - 2000)
    refuse(tmp_path, "3.dcm", "damaged or incomplete")


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90"])
def test_more_pixels_than_compressed_bytes_can_hold_are_refused_before_they_are_decoded(
    tmp_path, syntax
):
    slices = make_slices(LARGE, AXIAL)
    for image in slices:
        image.compress(syntax, generate_instance_uid=False)
        image.Rows = image.Columns = 60_000
        image.PixelData = image.PixelData[:8000] if syntax.endswith(".5") else image.PixelData
    refuse(save(tmp_path, slices), "declares 3600000000 pixels", "can hold")


@pytest.mark.parametrize("read", [list_series, read_modality, open_scan])
def test_a_damaged_field_is_refused_wherever_it_is_asked_for(tmp_path, read):
    path = save(tmp_path, make_slices(ARRAY[..., :1], AXIAL, NumberOfFrames="1")) / "1.dcm"
    content = path.read_bytes()
    for old, new in ((b"IS\2\x001 ", b"IS\2\0x "), (b"CS\x16\0ORIGINAL", b"US\x16\0ORIGINAL")):
        path.write_bytes(content.replace(old, new))
        assert path.read_bytes() != content
        with contextlib.suppress(InputError):
            read(path)


def test_a_transfer_syntax_of_several_values_is_refused(tmp_path):
    path = save(tmp_path, make_slices(ARRAY, AXIAL)) / "2.dcm"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"1.2.840.10008.1.2.1", b"1.2.840\\10008.1.2.1"))
    assert path.read_bytes() != content
    refuse(tmp_path, "2.dcm", "cannot be decoded")


def test_a_damaged_archive_and_one_with_a_password_are_refused(tmp_path):
    folder = save(tmp_path / "a", make_slices(ARRAY, AXIAL))
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(folder / "1.dcm", "1.dcm")
    whole = archive.read_bytes()
    start = whole.index(b"PK\x01\x02")
    locked = bytearray(whole)
    locked[6], locked[start + 8] = 1, 1  # the bit that says so, in both headers
    archive.write_bytes(locked)
    refuse(archive, "1.dcm", "password")
    archive.write_bytes(whole.replace(b"PK\x03\x04", b"PK\x03\x00"))
    refuse(archive, "1.dcm", "cannot be read")


def test_a_missing_package_is_named_with_what_installs_it(tmp_path, monkeypatch):
    def fail(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    folder = save(tmp_path, make_slices(ARRAY, AXIAL))
    monkeypatch.setattr(dicom.importlib, "import_module", fail)
    refuse(folder, "pydicom", "pip install 'medssl[dicom]'")


def test_pydicom_says_nothing_of_its_own(tmp_path, recwarn):
    with pydicom.config.disable_value_validation():
        save(tmp_path, make_slices(ARRAY, AXIAL, name=f"{NAME}{'x' * 70}"))  # longer than allowed
    image = pydicom.dcmread(tmp_path / "1.dcm")
    with pytest.warns(UserWarning, match="PN"):
        str(image.PatientName)
    recwarn.clear()
    open_scan(tmp_path)
    list_series(tmp_path)
    assert not list(recwarn)


def test_the_first_of_two_threads_to_be_done_leaves_it_quiet(recwarn):
    filters = list(warnings.filters)
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(keep_quiet())
    second.enter_context(keep_quiet())
    first.close()
    warnings.warn("a name", stacklevel=1)
    second.close()
    assert not list(recwarn)
    assert warnings.filters == filters


# ---------------------------------------------------------------- real files


@pytest.fixture
def real():
    return Path(os.environ["MEDSSL_DATA"])


@pytest.mark.real
@pytest.mark.parametrize(
    "name",
    [
        "dicom/ct_liver/dicom",
        "dicom/hippocrop_study1",
        "dicom/t2_oblique_study1",
        "oddities/dicom_series/mr_coronal_philips_0.6mm",
        "oddities/dicom_series/mr_non_isotropic_28x64_oblique",
        "oddities/dicom_series/mr_sagittal_compressed_jpeg",
        "oddities/dicom_series/mr_sagittal_compressed_jpegls",
        "oddities/dicom_series/mr_two_slices_only",
        "oddities/dicom_seg/23x38x3/image",
        "oddities/dicom_seg/ct_3slice",
        "oddities/rtstruct/ct",
    ],
)
def test_real_series_are_read_as_itk_reads_them(real, name):
    values, scan = read(real / name)
    itk, affine = read_itk(real / name)
    assert np.abs(values - itk).max() < 1e-9
    np.testing.assert_allclose(scan.affine, affine, atol=1e-4)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dicom_series/mr_non_isotropic_28x64_oblique", "mr_non_isotropic_28x64_oblique.expected"),
        ("dicom_series/mr_sagittal_compressed_jpeg", "mr_sagittal_compressed.expected"),
        ("dicom_series/mr_sagittal_compressed_jpegls", "mr_sagittal_compressed.expected"),
        (
            "dicom_multiframe/philips_enhanced_mr_8fr.dcm",
            "philips_enhanced_mr_8fr.expected_4d_1vol",
        ),
    ],
)
def test_real_oddities_have_the_voxels_of_their_reference(real, name, expected):
    import nibabel

    from medssl.transforms.geometry import resample

    path = real / "oddities" / name
    values, scan = read(path)
    reference = nibabel.load(path.parent / f"{expected}.nii.gz")
    wanted = np.asarray(reference.dataobj, dtype=np.float64).reshape(reference.shape[:3])
    # the reference counts its axes in another direction: copied, since nothing is interpolated
    found = resample(values[None], scan.affine, wanted.shape, reference.affine, "nearest")[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=0.5)


@pytest.mark.real
def test_a_real_file_of_frames_is_its_single_images(real):
    folder = real / "oddities/dicom_seg/23x38x3"
    single, frames = read(folder / "image"), read(folder / "multiframe/mf.dcm")
    np.testing.assert_array_equal(single[0], frames[0])
    np.testing.assert_allclose(single[1].affine, frames[1].affine, atol=1e-6)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dicom_series/ct_gap_5_5_10mm", "1 slice is missing"),
        ("dicom_series/ct_same_position_not_a_volume", "4 images at the same position"),
        ("dicom_series/ct_tilted_oblique_4sl", "1.21 mm beside"),
        ("dicom_series/mr_two_orientations_in_one_folder", "2 kinds of slices"),
        ("dicom_series/rgb_secondary_capture_j2k", "in color"),
        ("dicom_multiframe/philips_enhanced_4d_fmri.dcm", "4 images at each of 8 positions"),
        ("dicom_multiframe/emri_small.dcm", "does not say where it lies"),
        ("dicom_multiframe/emri_small_big_endian.dcm", "does not say where it lies"),
        ("dicom_single/no_meta.dcm", "no DICOM image series"),
        ("dicom_single/meta_missing_tsyntax.dcm", "no DICOM image series"),
        ("dicom_single/vlut_04.dcm", "does not say where it lies"),
        ("dicom_single/slicethickness_empty_string.dcm", "one slice, and no SliceThickness"),
        ("dicom_seg/liver.dcm", "a segmentation"),
        ("rtstruct/pydicom_rtdose_1frame.dcm", "a dose"),
        ("rtstruct/rt_for_ct.dcm", "it has no pixels (RTSTRUCT)"),
    ],
)
def test_real_oddities_are_refused_by_what_is_odd(real, name, words):
    refuse(real / "oddities" / name, words)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("dicom_single/CT_small.dcm", -896, 1167),
        ("dicom_single/MR_small.dcm", 127, 2145),
        ("dicom_single/decimal_rescale.dcm", -4096, -4096),
        ("dicom_multiframe/eCT_Supplemental.dcm", -1024, 172),
    ],
)
def test_real_single_files_are_read(real, name, low, high):
    values, _ = read(real / "oddities" / name)
    assert (values.min(), values.max()) == (low, high)


@pytest.mark.parametrize("content", [b"", b"\0" * 400, 900])
def test_a_slice_that_was_cut_off_as_it_was_copied_is_refused(tmp_path, content):
    save(tmp_path, make_slices(ARRAY, AXIAL))
    last = max(tmp_path.iterdir(), key=lambda path: read_place(path))
    whole = last.read_bytes()
    last.write_bytes(content if isinstance(content, bytes) else whole[:content])
    assert last.name in refuse(tmp_path, "copy")
    last.unlink()
    (tmp_path / "readme.txt").write_text("no slice")
    assert open_scan(tmp_path).shape == (7, 5, 3)  # of a scan without it nobody can know


def read_place(path):
    return pydicom.dcmread(path).ImagePositionPatient[2]


def test_a_mosaic_is_no_slice(tmp_path):
    slices = make_slices(ARRAY[..., :1], AXIAL, ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"])
    save(tmp_path, slices)
    refuse(tmp_path, "mosaic")


def test_a_uid_that_others_begin_with_is_its_own_series(tmp_path):
    for uid, patient in (("1.2.3.10", "J"), ("1.2.3.1", "A")):
        slices = make_slices(ARRAY, AXIAL, SeriesInstanceUID=uid, PatientID=patient)
        for index, one in enumerate(slices):
            one.save_as(tmp_path / f"{patient == 'A':d}_{index}.dcm", enforce_file_format=True)
    for uid, patient in (("1.2.3.10", "J"), ("1.2.3.1", "A")):
        assert dicom._read_first(Path(f"{tmp_path}#{uid}")).PatientID == patient


def test_a_lookup_table_without_values_is_an_error_of_that_file(tmp_path):
    slices = make_slices(ARRAY, AXIAL)
    for one in slices:
        del one.RescaleSlope, one.RescaleIntercept
        one.ModalityLUTSequence = [pydicom.Dataset()]
    save(tmp_path, slices)
    refuse(tmp_path, "cannot be read as DICOM")


def test_series_that_lie_in_the_folder_itself_are_listed(tmp_path):
    for uid in ("1.2.3.10", "1.2.3.1"):
        for index, one in enumerate(make_slices(ARRAY, AXIAL, SeriesInstanceUID=uid)):
            one.save_as(tmp_path / f"{uid}_{index}.dcm", enforce_file_format=True)
    with pytest.raises(InputError, match=r"2 cases, 0 with a mask"):
        read_dataset(tmp_path)
