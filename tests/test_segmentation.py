import contextlib
import copy
import os
import re
import shutil
import subprocess
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from matplotlib.path import Path as Outline
from series import LPS, join_frames, make_slices, save

from medssl.config import InputError
from medssl.formats.dicom import open_scan
from medssl.formats.dicom_files import open_segments
from medssl.formats.scan import Scan
from medssl.formats.segmentation import (
    fill_polygons,
    list_references,
    list_segments,
    read_note,
    read_segments,
)
from medssl.formats.segmentation_out import MAX_NOTE, find_code, write_rtstruct, write_seg

OBLIQUE = np.array(
    [[-0.7, 0.1, 0.5, 12], [0.1, -0.9, -0.3, 3], [0.15, -0.14, 2.4, -40], [0, 0, 0, 1]]
)
OBLIQUE[:3, 1] -= OBLIQUE[:3, 0] * (OBLIQUE[:3, 0] @ OBLIQUE[:3, 1]) / (OBLIQUE[:3, 0] ** 2).sum()
OBLIQUE[:3, 2] = 2.5 * np.cross(OBLIQUE[:3, 0], OBLIQUE[:3, 1]) / 0.63
NAMES = {1: "liver", 5: "kidney_left", 7: "Myokard \N{LATIN SMALL LETTER A WITH DIAERESIS}"}
NOTE = "made by a medssl model (pseudo-mask), voxels 0123abcd"
SECRETS = ("Avasarala", "Chrisjen", "Holden", "19700101")


def draw_mask(shape=(19, 14, 8)):
    """A box with a hole in which there is an island; a bit of noise; slices without anything."""
    mask = np.zeros(shape, np.uint8)
    mask[2:16, 1:12, 1:5] = 1
    mask[4:13, 3:9, 2:5] = 0
    mask[6:9, 5:7, 2:4] = 5
    noise = np.random.default_rng(0).random((*shape[:2], 1)) < 0.3
    mask[:, :, 5:6][noise] = 7
    mask[0, 0, 7] = mask[18, 13, 7] = 5  # at the edges of the image
    return mask


MASK = draw_mask()


def make_folder(folder, slices):
    return open_scan(save(folder, slices, [3, 1, 2, 0, 7, 5, 6, 4]))


def make_frames(folder, slices):
    folder.mkdir()
    path = folder / "enhanced.dcm"
    shuffled = [slices[index] for index in (3, 1, 2, 0, 7, 5, 6, 4)]
    join_frames(shuffled).save_as(path, enforce_file_format=True)
    return open_scan(path)


def make_archive(folder, slices):
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in save(folder, slices).iterdir():
            file.write(path, path.name)
    return open_scan(archive)


@pytest.fixture(scope="module")
def slices():
    stored = np.random.default_rng(1).integers(0, 1000, MASK.shape).astype(np.int16)
    return make_slices(stored, OBLIQUE)


@pytest.fixture(scope="module")
def scan(tmp_path_factory, slices):
    return make_folder(tmp_path_factory.mktemp("series"), slices)


WRITERS = {
    "seg": write_seg,
    "labelmap": partial(write_seg, as_labelmap=True),
    "rtstruct": write_rtstruct,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory, scan):
    """One file of each kind, of the same mask."""
    folder = tmp_path_factory.mktemp("masks")
    for name, write in WRITERS.items():
        write(folder / f"{name}.dcm", MASK, scan.header, NAMES, NOTE)
    return folder


def refuse(path, source, *words, values=None):
    with pytest.raises(InputError) as caught:
        read_segments(path, source, values)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def to_scan(scan, affine):
    """The way from voxels of a grid (affine to LPS) to those of a scan."""
    return np.linalg.inv(scan.affine) @ LPS @ affine


# ---------------------------------------------------------------- out and in again


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("make", [make_folder, make_frames, make_archive])
def test_a_mask_comes_back_on_the_same_voxels(tmp_path, slices, kind, make):
    scan = make(tmp_path / "series", slices)
    path = tmp_path / "mask.dcm"
    WRITERS[kind](path, MASK, scan.header, NAMES)
    label, names = read_segments(path, scan, {name: value for value, name in NAMES.items()})
    np.testing.assert_array_equal(label, MASK)
    assert names == NAMES


def test_frames_that_begin_within_a_byte_come_back(tmp_path):
    mask = np.where(MASK == 7, 5, MASK)[:, :13]  # 247 bits a frame: some reach into 32 bytes
    scan = make_folder(tmp_path / "scan", make_slices(np.zeros(mask.shape, np.int16), OBLIQUE))
    write_seg(tmp_path / "mask.dcm", mask, scan.header, NAMES)
    values = {"liver": 1, "kidney_left": 5}
    np.testing.assert_array_equal(read_segments(tmp_path / "mask.dcm", scan, values)[0], mask)


@pytest.mark.parametrize("kind", WRITERS)
def test_classes_are_numbered_as_they_come_where_no_values_are_asked_for(written, scan, kind):
    label, names = read_segments(written / f"{kind}.dcm", scan)
    np.testing.assert_array_equal(label, np.searchsorted([0, 1, 5, 7], MASK))
    assert names == {1: NAMES[1], 2: NAMES[5], 3: NAMES[7]}
    assert label.dtype == np.uint8


def test_a_label_is_taken_slice_by_slice(written, scan):
    pieces = list(open_segments(written / "seg.dcm", scan, None).iterate_values())
    assert [piece.shape for piece in pieces] == [(19 * 14,)] * 8, "not 30 bytes a voxel at once"
    found = np.concatenate(pieces).reshape(MASK.shape, order="F")
    np.testing.assert_array_equal(found, np.searchsorted([0, 1, 5, 7], MASK))


@pytest.mark.parametrize("kind", WRITERS)
def test_names_that_are_not_asked_for_are_passed_over(written, scan, kind):
    label, names = read_segments(written / f"{kind}.dcm", scan, {"kidney_left": 2})
    np.testing.assert_array_equal(label, 2 * (MASK == 5))
    assert names == {2: "kidney_left"}
    refuse(written / f"{kind}.dcm", scan, "['spleen']", "kidney_left", values={"spleen": 1})


@pytest.mark.parametrize("kind", WRITERS)
def test_a_class_without_voxels_and_one_without_a_name_are_kept(tmp_path, scan, kind):
    path = tmp_path / "mask.dcm"
    WRITERS[kind](path, np.where(MASK == 1, 300, 0), scan.header, {2: "spleen"})
    label, names = read_segments(path, scan, {"spleen": 2, "class 300": 300})
    np.testing.assert_array_equal(label, np.where(MASK == 1, 300, 0))
    assert names == {2: "spleen", 300: "class 300"}
    WRITERS[kind](path, np.zeros_like(MASK), scan.header, {2: "spleen"})
    label, names = read_segments(path, scan, {"spleen": 2})
    assert not label.any()
    made = pydicom.dcmread(path)  # which must not have sequences of nothing
    assert all(element.value for element in made.iterall() if element.keyword == "ContourSequence")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_single_class_comes_back(tmp_path, scan, kind):
    WRITERS[kind](tmp_path / "mask.dcm", 1 * (MASK == 1), scan.header, {1: "liver"})
    label, _ = read_segments(tmp_path / "mask.dcm", scan)
    np.testing.assert_array_equal(label, MASK == 1)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_note_comes_back(written, kind):
    assert read_note(written / f"{kind}.dcm") == NOTE


def test_a_note_that_is_too_long_is_no_note(tmp_path, scan):
    with pytest.raises(ValueError, match="64 characters"):
        write_seg(tmp_path / "mask.dcm", MASK, scan.header, NAMES, "x" * (MAX_NOTE + 1))


def test_a_mask_of_another_shape_or_of_images_that_have_gone_is_not_written(tmp_path, slices):
    scan = make_folder(tmp_path / "series", slices)
    with pytest.raises(ValueError, match=r"shape \(19, 14, 7\)"):
        write_seg(tmp_path / "mask.dcm", MASK[:, :, :7], scan.header, NAMES)
    (tmp_path / "series" / "1.dcm").write_bytes((tmp_path / "series" / "2.dcm").read_bytes())
    with pytest.raises(InputError, match="2 images at the same position"):
        write_rtstruct(tmp_path / "mask.dcm", MASK, scan.header, NAMES)
    save(tmp_path / "series", make_slices(MASK.astype(np.int16), OBLIQUE))
    with pytest.raises(InputError, match="other images than when it was read"):
        write_seg(tmp_path / "mask.dcm", MASK, scan.header, NAMES)
    assert not (tmp_path / "mask.dcm").exists()


# ---------------------------------------------------------------- as other programs read it


def test_highdicom_reads_the_same_voxels(written, scan):
    from highdicom.seg import segread

    for kind in ("seg", "labelmap"):
        volume = segread(written / f"{kind}.dcm").get_volume(combine_segments=True)
        places = np.array(np.nonzero(volume.array))
        found = to_scan(scan, volume.affine) @ [*places, np.ones(places.shape[1])]
        voxels = np.rint(found[:3]).astype(int)
        assert np.abs(found[:3] - voxels).max() < 0.01
        label = np.zeros_like(MASK)
        label[tuple(voxels)] = np.array([0, 1, 5, 7])[volume.array[tuple(places)]]
        np.testing.assert_array_equal(label, MASK)


def test_contours_hold_the_voxels_of_another_program(written, scan):
    structures = pydicom.dcmread(written / "rtstruct.dcm")
    grid = np.stack(np.meshgrid(*map(np.arange, MASK.shape[:2]), indexing="ij"), -1).reshape(-1, 2)
    label = np.zeros_like(MASK)
    for value, region in zip(NAMES, structures.ROIContourSequence, strict=True):
        inside = np.zeros(MASK.shape, bool)
        for contour in region.ContourSequence:
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
            i, j, k = to_scan(scan, np.eye(4))[:3] @ [*points.T, np.ones(len(points))]
            np.testing.assert_allclose(k, np.rint(k[0]), atol=1e-4)
            halves = 2 * np.stack([i, j])  # each point lies in the middle of two voxels
            np.testing.assert_allclose(halves, np.rint(halves), atol=1e-3)
            assert (np.rint(halves).sum(0) % 2 == 1).all()
            filled = Outline(np.stack([i, j], 1), closed=False).contains_points(grid)
            inside[:, :, round(k[0])] ^= filled.reshape(MASK.shape[:2])
        label[inside] = value
    np.testing.assert_array_equal(label, MASK)


def test_contours_keep_the_area():
    square = np.array([[1.5, 2], [1.5, 6], [5.5, 6], [5.5, 2]]) - [0, 0.5]
    assert fill_polygons([square], (9, 9)).sum() == 4 * 4
    assert fill_polygons([square[::-1]], (9, 9)).sum() == 4 * 4
    assert fill_polygons([square - 3], (9, 9)).sum() == 3 * 3  # cut by the edge of the image
    assert fill_polygons([square + 5], (9, 9)).sum() == 2 * 2
    assert not fill_polygons([square - 20], (9, 9)).any()
    assert not fill_polygons([square, square], (9, 9)).any()
    rng = np.random.default_rng(0)
    stars = [rng.uniform(-3, 12, (9, 2)) for _ in range(20)]
    centers = np.stack(np.meshgrid(np.arange(9), np.arange(9), indexing="ij"), -1).reshape(-1, 2)
    for star in stars:  # edges that cross each other: odd is inside
        winding = count_crossings(star, centers)
        np.testing.assert_array_equal(fill_polygons([star], (9, 9)).ravel(), winding % 2 == 1)
    one_by_one = np.logical_xor.reduce([fill_polygons([star], (9, 9)) for star in stars])
    np.testing.assert_array_equal(fill_polygons(stars, (9, 9)), one_by_one)


def count_crossings(polygon, centers):
    """How many edges a ray from each point toward low I meets."""
    count = np.zeros(len(centers), int)
    for (i0, j0), (i1, j1) in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        meets = (j0 <= centers[:, 1]) != (j1 <= centers[:, 1])
        at = i0 + (centers[:, 1] - j0) / (j1 - j0) * (i1 - i0)
        count += meets & (at < centers[:, 0])
    return count


def find_errors(path):
    """Errors that the validator of dicom3tools finds; none where it is not installed."""
    if shutil.which("dciodvfy") is None:
        return []
    done = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
    assert re.search(r"^(Segmentation|RTStructureSet)$", done.stderr, re.M), done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("Error")]


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is missing")
@pytest.mark.parametrize("make", [make_folder, make_frames])
@pytest.mark.parametrize("kind", ["seg", "rtstruct"])
def test_the_validator_of_dicom3tools_finds_no_error(tmp_path, slices, kind, make):
    path = tmp_path / "mask.dcm"
    scan = make(tmp_path / "series", slices)
    WRITERS[kind](path, MASK, scan.header, NAMES, NOTE, "runs/first")
    assert not find_errors(path)


@pytest.mark.skipif(shutil.which("segimage2itkimage") is None, reason="dcmqi is missing")
@pytest.mark.parametrize("kind", ["seg", "labelmap"])
def test_dcmqi_reads_the_same_voxels(tmp_path, written, scan, kind):
    command = ["segimage2itkimage", "--inputDICOM", written / f"{kind}.dcm", "--outputType", "nrrd"]
    subprocess.run([*command, "--outputDirectory", tmp_path], check=True, capture_output=True)
    label = np.zeros_like(MASK)
    for path in tmp_path.glob("*.nrrd"):
        array, affine = read_itk(path)
        places = np.array(np.nonzero(array))
        found = to_scan(scan, affine) @ [*places, np.ones(places.shape[1])]
        label[tuple(np.rint(found[:3]).astype(int))] = array[tuple(places)]
    np.testing.assert_array_equal(label, np.searchsorted([0, 1, 5, 7], MASK))


# ---------------------------------------------------------------- what stands in the files


@pytest.mark.parametrize("kind", WRITERS)
def test_every_image_is_referred_to_and_no_person(written, slices, kind):
    path = written / f"{kind}.dcm"
    made = pydicom.dcmread(path)
    images = {
        element.value for element in made.iterall() if element.keyword == "ReferencedSOPInstanceUID"
    }
    assert images >= {image.SOPInstanceUID for image in slices}
    assert made.StudyInstanceUID == slices[0].StudyInstanceUID
    assert made.FrameOfReferenceUID == slices[0].FrameOfReferenceUID
    assert (made.PatientID, made.PatientSex) == ("PGBM-002", "F")
    assert made.PatientName == ""
    content = path.read_bytes().lower()
    assert not [secret for secret in SECRETS if secret.lower().encode() in content]


def test_a_patient_number_that_is_the_name_stays_behind(tmp_path):
    slices = make_slices(MASK.astype(np.int16), OBLIQUE, PatientID="avasarala1")
    for image in slices:  # where else names may stand
        image.StudyDescription = "Avasarala"
        image.PatientComments = "Chrisjen"
        image.OperatorsName = "Holden^James"
        person = pydicom.Dataset()
        person.InstitutionName = "Holden"
        image.ReferringPhysicianIdentificationSequence = pydicom.Sequence([person])
    scan = open_scan(save(tmp_path / "series", slices))
    for kind, write in WRITERS.items():
        path = tmp_path / f"{kind}.dcm"
        write(path, MASK, scan.header, NAMES)
        content = path.read_bytes().lower()
        assert not [secret for secret in SECRETS if secret.lower().encode() in content]


def test_headers_that_lack_what_they_should_have_are_filled(tmp_path):
    slices = make_slices(MASK.astype(np.int16), OBLIQUE)
    for image in slices:
        del image.PatientSex, image.PatientID, image.SliceThickness, image.FrameOfReferenceUID
        del image.StudyID, image.AccessionNumber, image.PatientBirthDate, image.StudyDate
    scan = open_scan(save(tmp_path / "series", slices))
    for kind, write in WRITERS.items():
        write(tmp_path / f"{kind}.dcm", MASK, scan.header, NAMES)
        label, _ = read_segments(
            tmp_path / f"{kind}.dcm", scan, {name: value for value, name in NAMES.items()}
        )
        np.testing.assert_array_equal(label, MASK)


@pytest.mark.parametrize("charset", ["", "ISO 2022 IR 100", "ISO_IR 100"])
def test_source_texts_of_any_character_set_are_kept(tmp_path, charset):
    slices = make_slices(MASK.astype(np.int16), OBLIQUE, PatientID="M\N{LATIN SMALL LETTER O}1")
    for image in slices:
        image.SpecificCharacterSet = charset
    if charset == "ISO_IR 100":
        for image in slices:
            image.PatientID = "M\N{LATIN SMALL LETTER O WITH DIAERESIS}1"
    scan = open_scan(save(tmp_path / "series", slices))
    for kind, write in WRITERS.items():
        write(tmp_path / f"{kind}.dcm", MASK, scan.header, NAMES)
        assert pydicom.dcmread(tmp_path / f"{kind}.dcm").PatientID == slices[0].PatientID


def test_frames_may_have_their_measures_one_by_one(tmp_path, slices):
    enhanced = join_frames(slices)
    shared = enhanced.SharedFunctionalGroupsSequence[0]
    for frame in enhanced.PerFrameFunctionalGroupsSequence:
        frame.PixelMeasuresSequence = shared.PixelMeasuresSequence
        frame.PlaneOrientationSequence = shared.PlaneOrientationSequence
    del enhanced.SharedFunctionalGroupsSequence
    enhanced.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)
    scan = open_scan(tmp_path / "enhanced.dcm")
    for kind, write in WRITERS.items():
        write(tmp_path / f"{kind}.dcm", MASK, scan.header, NAMES)
        label, _ = read_segments(tmp_path / f"{kind}.dcm", scan)
        np.testing.assert_array_equal(label, np.searchsorted([0, 1, 5, 7], MASK))


def test_images_that_nothing_can_refer_to_get_no_mask(tmp_path):
    slices = make_slices(MASK.astype(np.int16), OBLIQUE)
    for image in slices:
        del image.SeriesInstanceUID
    scan = open_scan(save(tmp_path / "series", slices))
    for write in WRITERS.values():
        with pytest.raises(InputError, match="no SeriesInstanceUID"):
            write(tmp_path / "mask.dcm", MASK, scan.header, NAMES)


def test_segments_have_codes_sides_and_the_program(written):
    liver, kidney, other = pydicom.dcmread(written / "seg.dcm").SegmentSequence
    (kind,) = liver.SegmentedPropertyTypeCodeSequence
    assert (kind.CodeValue, kind.CodingSchemeDesignator) == ("10200004", "SCT")
    (kind,) = kidney.SegmentedPropertyTypeCodeSequence
    assert (kind.CodeValue, kind.CodeMeaning) == ("64033007", "Kidney")
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    (kind,) = other.SegmentedPropertyTypeCodeSequence
    assert (kind.CodeValue, kind.CodingSchemeDesignator) == ("7", "99MEDSSL")
    assert [one.SegmentLabel for one in (liver, kidney, other)] == list(NAMES.values())
    (algorithm,) = liver.SegmentationAlgorithmIdentificationSequence
    assert algorithm.AlgorithmName == "medssl"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("Liver", ("AnatomicalStructure", "Liver", "")),
        ("kidneys", ("AnatomicalStructure", "Kidney", "")),
        ("rightLung", ("AnatomicalStructure", "Lung", "Right")),
        ("left ventricle", ("AnatomicalStructure", "LeftVentricle", "")),
        ("left_femur", ("AnatomicalStructure", "Femur", "Left")),
        ("L3", ("AnatomicalStructure", "L3Vertebra", "")),
        ("tumour", ("MorphologicallyAbnormalStructure", "Neoplasm", "")),
        ("fat", ("Tissue", "Fat", "")),
        ("myocardium", ("AnatomicalStructure", "Myocardium", "")),
        ("anterior", ("AnatomicalStructure", "", "")),
        ("left", ("AnatomicalStructure", "", "")),
        ("", ("AnatomicalStructure", "", "")),
    ],
)
def test_names_have_the_codes_of_their_organs(name, code):
    assert find_code(name) == code


def test_every_code_of_the_table_exists():
    from pydicom.sr.codedict import codes

    from medssl.formats import segmentation_out as table

    for kind in {*table._ORGANS, *table._TISSUES, *table._CHANGES, *table._OTHER_WORDS.values()}:
        assert kind in table._NOT_IN_PYDICOM or getattr(codes.SCT, kind).value


# ---------------------------------------------------------------- what is refused


def test_a_label_of_another_patient_is_refused(tmp_path, written):
    slices = make_slices(MASK.astype(np.int16), OBLIQUE)
    other = open_scan(save(tmp_path, slices))
    for kind in WRITERS:
        refuse(written / f"{kind}.dcm", other, "belongs to other images")


def test_a_label_on_another_grid_is_refused(written, scan):
    moved = scan._replace(affine=scan.affine @ shift(0.4, 0, 0), header=None)
    finer = scan._replace(affine=scan.affine @ np.diag([1, 0.5, 1, 1]), shape=(19, 28, 8))
    doubled = scan._replace(affine=scan.affine @ np.diag([1, 1, 0.5, 1]), shape=(19, 14, 16))
    cut = scan._replace(shape=(19, 14, 4))
    beside = scan._replace(affine=scan.affine @ shift(0, 0, 0.4))
    for kind in ("seg", "labelmap"):
        path = written / f"{kind}.dcm"
        refuse(path, moved, "0.40 voxels beside")
        refuse(path, finer, "another grid")
        refuse(path, doubled, "2.528 mm apart")
        refuse(path, cut, "beyond the scan")
    refuse(written / "rtstruct.dcm", beside, "between or across the slices")
    refuse(written / "rtstruct.dcm", cut, "beyond the slices")
    refuse(written / "rtstruct.dcm", doubled, "'liver' is drawn on one of 2 slices")
    refuse(written / "rtstruct.dcm", scan._replace(affine=scan.affine @ shift(0, 40, 0)), "beside")


def shift(i, j, k):
    moved = np.eye(4)
    moved[:3, 3] = i, j, k
    return moved


def test_a_label_on_turned_axes_is_put_where_it_lies(written, scan):
    turn = np.array([[0, -1, 0, 18], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    turned = Scan((14, 19, 8), scan.affine @ turn, 1, scan.iterate_values)
    for kind in WRITERS:
        label, _ = read_segments(written / f"{kind}.dcm", turned)
        expected = np.searchsorted([0, 1, 5, 7], MASK).transpose(1, 0, 2)[:, ::-1]
        np.testing.assert_array_equal(label, expected)


def change(path, target, edit):
    """Write a file again after an edit."""
    made = pydicom.dcmread(path)
    edit(made)
    made.save_as(target)
    return target


def test_overlapping_segments_are_refused_until_one_is_named(tmp_path, written, scan):
    def double(made):
        region = copy.deepcopy(made.ROIContourSequence[0])
        region.ReferencedROINumber = 2
        made.ROIContourSequence[1] = region

    path = change(written / "rtstruct.dcm", tmp_path / "a.dcm", double)
    refuse(path, scan, "'kidney_left' and 'liver' overlap", "slice 2")
    label, _ = read_segments(path, scan, {"liver": 1})
    np.testing.assert_array_equal(label, MASK == 1)


def test_a_name_that_two_have_is_refused_where_it_is_asked_for(tmp_path, written, scan):
    def rename(made):
        made.SegmentSequence[1].SegmentLabel = "liver"

    path = change(written / "seg.dcm", tmp_path / "a.dcm", rename)
    refuse(path, scan, "several are called ['liver']", values={"liver": 1})
    assert set(read_segments(path, scan)[1]) == {1, 2, 3}


def test_values_of_a_labelmap_that_no_segment_has_are_refused(tmp_path, written, scan):
    def forget(made):
        del made.SegmentSequence[-1]

    path = change(written / "labelmap.dcm", tmp_path / "a.dcm", forget)
    refuse(path, scan, "segments that it does not list, [3]")


def test_a_fractional_segmentation_is_refused(tmp_path, written, scan):
    def soften(made):
        made.SegmentationType = "FRACTIONAL"

    path = change(written / "seg.dcm", tmp_path / "a.dcm", soften)
    refuse(path, scan, "FRACTIONAL", "save it as BINARY")


def draw_block(folder, depth=18):
    """A series, and the structure set of a block that goes through all of its slices."""
    block = np.zeros((6, 5, depth), np.uint8)
    block[1:4, 1:4] = 1
    scan = open_scan(save(folder / "series", make_slices(block.astype(np.int16), np.eye(4))))
    write_rtstruct(folder / "all.dcm", block, scan.header, {1: "liver"})
    return scan, block, folder / "all.dcm"


@pytest.mark.parametrize(
    ("drawn", "words"),
    [
        ((2, 4, 6, 8, 10), "one of 2 slices"),
        ((2, 4, 6, 8, 10, 11), "single slices of the scan (3, 5, 7, 9)"),
        ((2, 5, 7, 10, 12), "single slices of the scan (3, 6, 8, 11, 13)"),
        ((1, 3, 5, 8, 10, 13), "single slices of the scan (2, 4, 6, 9, 11, ...)"),
        ((4, 6, 8), "single slices of the scan (5, 7, 9)"),
        ((4, 8), "single slices of the scan (5, 9)"),
        ((2, 3, 4, 9, 10, 11), ""),
        ((2, 3, 4, 6, 7), ""),
        ((2, 3, 4, 9), ""),
        ((7,), ""),
    ],
)
def test_a_region_drawn_on_some_of_its_slices_is_refused(tmp_path, drawn, words):
    scan, block, path = draw_block(tmp_path)

    def thin(made):
        region = made.ROIContourSequence[0]
        region.ContourSequence = [region.ContourSequence[k] for k in drawn]

    path = change(path, tmp_path / "a.dcm", thin)
    if words:
        refuse(path, scan, f"'liver' is drawn on {words}", "interpolate")
    else:
        kept = np.isin(np.arange(block.shape[2]), drawn)
        np.testing.assert_array_equal(read_segments(path, scan)[0], block * kept)


def test_single_slices_beside_each_other_are_pieces_of_their_own(tmp_path):
    scan, block, path = draw_block(tmp_path)
    block[:] = 0
    block[0, 0, 2] = block[3, 3, 7] = block[5, 0, 9] = block[2, 4, 14] = 1
    write_rtstruct(path, block, scan.header, {1: "lesions"})
    np.testing.assert_array_equal(read_segments(path, scan)[0], block)


@pytest.mark.parametrize("apart", [False, True])
def test_a_contour_that_is_stored_twice_counts_once(tmp_path, written, scan, apart):
    def double(made):
        for region in list(made.ROIContourSequence):
            again = copy.deepcopy(region)
            for contour in again.ContourSequence:  # from another point, the other way round
                points = np.array(contour.ContourData).reshape(-1, 3)
                contour.ContourData = np.roll(points, 2, 0)[::-1].ravel().tolist()
            if apart:
                made.ROIContourSequence.append(again)
            else:
                region.ContourSequence += again.ContourSequence

    path = change(written / "rtstruct.dcm", tmp_path / "a.dcm", double)
    label, _ = read_segments(path, scan)
    np.testing.assert_array_equal(label, read_segments(written / "rtstruct.dcm", scan)[0])


@pytest.mark.parametrize("kind", ["seg", "labelmap"])
def test_pixels_of_a_segment_that_is_not_listed_are_refused(tmp_path, written, scan, kind):
    def forget(made):
        del made.SegmentSequence[1]

    path = change(written / f"{kind}.dcm", tmp_path / "a.dcm", forget)
    number = pydicom.dcmread(written / f"{kind}.dcm").SegmentSequence[1].SegmentNumber
    refuse(path, scan, f"segments that it does not list, [{number}]")


def test_frames_that_name_no_segment_are_refused(tmp_path, written, scan):
    def forget(made):
        del made.PerFrameFunctionalGroupsSequence[3].SegmentIdentificationSequence

    path = change(written / "seg.dcm", tmp_path / "a.dcm", forget)
    refuse(path, scan, "holds voxels of no segment")


def test_regions_of_points_are_passed_over(tmp_path, written, scan):
    def mark(made):
        for contour in made.ROIContourSequence[1].ContourSequence:
            contour.ContourGeometricType = "POINT"

    path = change(written / "rtstruct.dcm", tmp_path / "a.dcm", mark)
    assert read_segments(path, scan)[1] == {1: NAMES[1], 3: NAMES[7]}


def test_an_image_and_a_text_are_no_labels(tmp_path, slices, scan):
    save(tmp_path, slices)
    refuse(tmp_path / "1.dcm", scan, "this is CT")
    (tmp_path / "notes.dcm").write_text("no DICOM")
    refuse(tmp_path / "notes.dcm", scan, "notes.dcm")


def test_a_cut_file_is_refused_by_its_name(tmp_path, written, scan):
    for kind in WRITERS:
        path = tmp_path / f"{kind}.dcm"
        path.write_bytes((written / path.name).read_bytes()[:-300])
        refuse(path, scan, f"{kind}.dcm")


@pytest.mark.parametrize("read", [list_segments, list_references, read_note])
def test_names_and_references_of_a_cut_file_end_in_nothing_but_a_refusal(tmp_path, written, read):
    for kind in WRITERS:
        content = (written / f"{kind}.dcm").read_bytes()
        for length in range(200, len(content), 97):
            path = tmp_path / f"{kind}.dcm"
            path.write_bytes(content[:length])
            with contextlib.suppress(InputError):
                read(path)


# ---------------------------------------------------------------- real files


def read_itk(path):
    """Values (I, J, K) of a file and their affine to LPS."""
    image = SimpleITK.ReadImage(path)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), affine


@pytest.fixture
def odd():
    return Path(os.environ["MEDSSL_DATA"]) / "oddities"


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("kind", WRITERS)
def test_the_liver_of_a_real_ct_goes_round(tmp_path, odd, kind):
    from PIL import Image

    folder = odd.parent / "dicom/ct_liver"
    scan = open_scan(folder / "dicom")
    drawn = [np.array(Image.open(path)) for path in sorted(folder.glob("liver_ground_png/*.png"))]
    mask = (
        np.stack(drawn, 0).transpose(2, 1, 0)[:, :, ::-1] > 0
    )  # the files come from the head down
    path = tmp_path / "liver.dcm"
    WRITERS[kind](path, mask.astype(np.uint8), scan.header, {1: "liver"})
    label, names = read_segments(path, scan)
    np.testing.assert_array_equal(label, mask)
    assert names == {1: "liver"}
    assert round(mask.sum() * abs(np.linalg.det(scan.affine)) / 1000) == 1417  # ml
    assert b"CHAOS^CT" not in path.read_bytes()


@pytest.mark.real
@pytest.mark.parametrize(
    "name",
    [
        "../dicom/hippocrop_study1",
        "../dicom/t2_oblique_study1",
        "dicom_series/mr_coronal_philips_0.6mm",
        "dicom_series/mr_non_isotropic_28x64_oblique",
        "dicom_series/mr_sagittal_compressed_jpegls",
        "dicom_series/mr_two_slices_only",
        "dicom_multiframe/philips_enhanced_mr_8fr.dcm",
        "dicom_multiframe/eCT_Supplemental.dcm",
        "dicom_single/MR_small.dcm",
        "dicom_seg/23x38x3/multiframe",
        "dicom_seg/ct_3slice",
    ],
)
def test_masks_of_real_odd_series_go_round(tmp_path, odd, name):
    scan = open_scan(odd / name)
    i, j, _ = (size // 4 for size in scan.shape)
    mask = np.zeros(scan.shape, np.uint8)
    mask[i : 2 * i, j : 2 * j] = 1
    mask[i + 2 : i + 4, j + 2 : j + 3] = 0
    mask[2 * i : 2 * i + 3, 2 * j : 2 * j + 3, :1] = 2
    for kind, write in WRITERS.items():
        path = tmp_path / f"{kind}.dcm"
        write(path, mask, scan.header, {1: "liver", 2: "tumor"})
        np.testing.assert_array_equal(read_segments(path, scan)[0], mask)
        assert kind == "labelmap" or not find_errors(path)
        assert b"avasarala" not in path.read_bytes().lower()


@pytest.mark.real
@pytest.mark.parametrize(
    ("label", "image", "reference"),
    [
        ("liver.dcm", "ct_3slice", "liver_seg.nrrd"),
        ("23x38x3/seg/label.seg", "23x38x3/image", "23x38x3/nrrd/label.nrrd"),
        ("23x38x3/seg/label.seg", "23x38x3/multiframe", "23x38x3/nrrd/label.nrrd"),
        ("sparse-labelmap-noppv.dcm", None, "sparse_labelmap_noppv_seg.nrrd"),
        ("sparse-labelmap-ppv5.dcm", None, "sparse_labelmap_noppv_seg.nrrd"),
    ],
)
def test_real_segmentations_have_the_voxels_of_their_reference(odd, label, image, reference):
    folder = odd / "dicom_seg"
    array, affine = read_itk(folder / reference)
    grid = Scan(array.shape, LPS @ affine, 1, lambda: iter(()))
    found, names = read_segments(folder / label, grid)
    np.testing.assert_array_equal(found > 0, array > 0)
    assert [name.lower() for name in names.values()] == ["liver"]
    if image is not None:
        scan = open_scan(folder / image)
        np.testing.assert_array_equal(read_segments(folder / label, scan)[0], found)


@pytest.mark.real
def test_a_real_structure_set_has_the_voxels_of_another_program(odd):
    scan = open_scan(odd / "rtstruct/ct")
    label, names = read_segments(odd / "rtstruct/rt_for_ct.dcm", scan)
    assert names == {1: "ROI-1"}
    expected = np.zeros(scan.shape, bool)
    structures = pydicom.dcmread(odd / "rtstruct/rt_for_ct.dcm")
    for contour in structures.ROIContourSequence[0].ContourSequence:
        points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
        i, j, k = to_scan(scan, np.eye(4))[:3] @ [*points.T, np.ones(len(points))]
        grid = np.stack(np.meshgrid(*map(np.arange, scan.shape[:2]), indexing="ij"), -1)
        filled = Outline(np.stack([i, j], 1)).contains_points(grid.reshape(-1, 2))
        expected[:, :, round(k[0])] ^= filled.reshape(scan.shape[:2])
    assert expected.any()
    np.testing.assert_array_equal(label > 0, expected)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rt_invalid_reference.dcm", "'ROI-1' at (-50.05, -42.48, 70.00) lies beyond the slices"),
        ("pydicom_rtstruct.dcm", "belongs to other images"),
        ("pydicom_rtdose_1frame.dcm", "this is RTDOSE"),
    ],
)
def test_real_structure_sets_of_other_images_are_refused(odd, name, words):
    refuse(odd / "rtstruct" / name, open_scan(odd / "rtstruct/ct"), words)
