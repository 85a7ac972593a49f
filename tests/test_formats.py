# One scan in every kind of file: the same voxels, the same way from check to the mask.
import gzip
import shutil
import zipfile

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from commands import run_command
from series import make_slices, save

from medssl.config import IGNORE, InputError
from medssl.data.files import hash_source, write_draft
from medssl.data.io import read_image, read_label, read_label_values, read_origin, write_mask
from medssl.data.layouts import read_dataset
from medssl.data.phantoms import make_phantom
from medssl.formats import dicom_files, metaimage, nrrd
from medssl.formats.readers import DICOM, KINDS, find_reader

pytestmark = pytest.mark.usefixtures("brief")

AFFINE = np.array([[-1.0, 0, 0, 20], [0, -1.0, 0, 10], [0, 0, 2.0, -30], [0, 0, 0, 1]])
NAMES = {1: "Left Lobe", 2: "right lobe", 3: "core"}
LABELS = [f"data.labels.{value}={name}" for value, name in NAMES.items()]
SHAPE = (24, 28, 16)
VALUES = (0, 1, 2, 3)


def make_case(index):
    image, classes = make_phantom(0, index, SHAPE, "organs")
    return image.astype(np.int16), classes


def write_series(folder, image):
    return save(folder, make_slices((image + 1000).astype(np.int16), AFFINE))


def write_object(path, series, classes):
    """Write a label as SEG, or RTSTRUCT where the path says so."""
    header = dicom_files.open_image(series, None).header
    dicom_files.write(path, classes, AFFINE, header, "", NAMES)


def zip_folder(folder):
    path = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"study/{file.name}")
    shutil.rmtree(folder)
    return path


def write_nibabel(kind, path, array):
    kind(array, AFFINE).to_filename(path)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A data set with a case of each kind, image and label."""
    root = tmp_path_factory.mktemp("mixed")
    images, labels = root / "images", root / "labels"
    images.mkdir()
    labels.mkdir()
    cases = {name: make_case(index) for index, name in enumerate("abcdefg")}
    for name in "abg":
        write_series(images / name, cases[name][0])
    write_object(labels / "a.dcm", images / "a", cases["a"][1])
    write_object(labels / "b.rtstruct.dcm", images / "b", cases["b"][1])
    zip_folder(images / "b")
    nrrd.write(images / "c.nrrd", cases["c"][0], AFFINE, None, "", {})
    nrrd.write(labels / "c.nrrd", cases["c"][1], AFFINE, None, "", {})
    metaimage.write(images / "d.mha", cases["d"][0], AFFINE, None, "", {})
    metaimage.write(labels / "d.mha", cases["d"][1], AFFINE, None, "", {})
    write_nibabel(nib.MGHImage, images / "e.mgz", cases["e"][0])
    write_nibabel(nib.MGHImage, labels / "e.mgz", cases["e"][1])
    write_nibabel(nib.Nifti1Pair, images / "f.img", cases["f"][0])
    write_mask(labels / "f.nii.gz", cases["f"][1], AFFINE, VALUES)
    return root, cases


def test_a_case_of_each_kind_has_its_voxels(mixed):
    root, cases = mixed
    dataset = read_dataset(root, labels=NAMES)
    assert [case.case_id for case in dataset.cases] == list("abcdefg")
    assert [case.case_id for case in dataset.cases if case.label is None] == ["g"]
    for case in dataset.cases:
        image, classes = cases[case.case_id]
        volume = read_image(case.images, 1)
        np.testing.assert_array_equal(volume.array[0], image)
        np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
        if case.label:
            label, affine = read_label(case.label, VALUES, None, case)
            np.testing.assert_array_equal(label, classes, case.case_id)
            np.testing.assert_allclose(affine, AFFINE, atol=1e-5)


@pytest.fixture(scope="module")
def trained(mixed, tmp_path_factory):
    root, _ = mixed
    code, said = run_command("check", root, *LABELS)
    assert code == 0, said
    run = tmp_path_factory.mktemp("runs") / "run"
    few = ("rounds=0", "steps=2", "method=labels_only", "network.width=0.25", "tracking.uri=none")
    code, said = run_command("train", root, *LABELS, *few, "--run", run)
    assert code == 0, said
    return run


def read_itk(path):
    image = SimpleITK.ReadImage(str(path))
    return SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)


@pytest.mark.slow
def test_masks_are_of_the_kind_of_their_scans_and_of_the_same_voxels(mixed, trained, tmp_path):
    root, _ = mixed
    out = tmp_path / "masks"
    code, said = run_command("predict", trained, root / "images", "--out", out)
    assert code == 0, said
    names = {path.name for path in out.iterdir() if path.suffix not in (".json", ".jsonl")}
    kinds = {"a": ".dcm", "b": ".dcm", "c": ".nrrd", "d": ".mha", "e": ".nii.gz", "f": ".nii.gz"}
    assert names == {f"{name}{suffix}" for name, suffix in kinds.items()} | {"g.dcm"}
    code, said = run_command("predict", trained, root, "--out", tmp_path / "b", "--format", "mha")
    assert code == 0, said
    for case in read_dataset(root, labels=NAMES).cases:
        mask = out / f"{case.case_id}{kinds.get(case.case_id, '.dcm')}"
        classes, affine = read_label(mask, VALUES, None, case)
        np.testing.assert_array_equal(classes, read_itk(tmp_path / "b" / f"{case.case_id}.mha"))
        np.testing.assert_allclose(affine, AFFINE, atol=1e-5)
        assert read_origin(mask, case) == "prediction"
    assert dicom_files.read_names(out / "g.dcm") == NAMES
    code, said = run_command("predict", trained, root / "images", "--out", out)
    assert code == 0, said  # what predictions wrote is replaced


STARTS = {
    ".nii": bytes(nib.Nifti1Image(np.ones((2, 3, 4), np.uint8), AFFINE).to_bytes()),
    ".nii (2)": bytes(nib.Nifti2Image(np.ones((2, 3, 4), np.uint8), AFFINE).to_bytes()),
    ".mgh": bytes(nib.MGHImage(np.ones((2, 3, 4), np.uint8), AFFINE).to_bytes()),
    ".nrrd": b"NRRD0004\ntype: uchar\n",
    ".mha": b"ObjectType = Image\nNDims = 3\n",
    ".png": b"\x89PNG\r\n\x1a\n" + bytes(400),
    ".jpg": b"\xff\xd8\xff\xe0" + bytes(400),
    ".tif": b"II*\0" + bytes(400),
    ".dcm": bytes(128) + b"DICM" + bytes(400),
    "unpack": b"BZh9" + bytes(400),
}
SAME = {".nii.gz": ".nii", ".mgz": ".mgh", ".hdr": ".nii"}
OTHERS = [
    (suffix, start)
    for suffix in (".nii", ".nii.gz", ".nrrd", ".mha", ".mgh", ".mgz", ".hdr", ".png")
    for start in STARTS
    if SAME.get(suffix, suffix) != start.split()[0] and (suffix, start) != (".png", ".jpg")
    if (suffix, start) != (".png", ".tif")  # a picture is read whatever its suffix
]


@pytest.mark.parametrize(("suffix", "start"), OTHERS)
def test_a_file_under_the_name_of_another_kind_is_called_what_it_is(tmp_path, suffix, start):
    path, content = tmp_path / f"a{suffix}", STARTS[start]
    path.write_bytes(gzip.compress(content) if suffix in (".nii.gz", ".mgz") else content)
    (tmp_path / "a.img").write_bytes(bytes(24))
    word = start.split()[0]
    word = word if word == "unpack" else rf"rename it to \{word}"
    with pytest.raises(InputError, match=word) as raised:
        read_label_values(path)
    assert str(raised.value).startswith(str(path))


def test_a_mask_in_dicom_is_asked_for_of_dicom_alone(mixed, trained, tmp_path):
    inputs = [mixed[0] / "images" / name for name in ("a", "c.nrrd")]
    asked = ("--out", tmp_path, "--format", "dicom-rtstruct")
    code, said = run_command("predict", trained, *inputs, *asked)
    assert code == 1
    assert "c.nrrd: is no DICOM series" in said
    assert (tmp_path / "a.rtstruct.dcm").is_file()
    code, said = run_command("predict", trained, *inputs, "--out", tmp_path, "--format", "dicom")
    assert code == 2
    assert "--format dicom: is none of nifti, nrrd, seg-nrrd, mha, dicom-seg" in said


def test_segments_are_matched_by_name_whatever_their_numbers(tmp_path):
    image, classes = make_case(0)
    for name, order in (("a", (1, 2, 3)), ("b", (2, 3, 1))):
        series = write_series(tmp_path / "images" / name, image)
        header = dicom_files.open_image(series, None).header
        turned = np.array([0, *order])[classes]
        names = {order[value - 1]: text for value, text in NAMES.items()}
        (tmp_path / "labels").mkdir(exist_ok=True)
        path = tmp_path / "labels" / f"{name}.dcm"
        dicom_files.write(path, turned, AFFINE, header, "", names)
    dataset = read_dataset(tmp_path)
    assert dataset.labels == {0: "background", 1: "core", 2: "Left Lobe", 3: "right lobe"}
    wanted = np.array([0, 2, 3, 1])[classes]
    for case in dataset.cases:
        np.testing.assert_array_equal(read_label(case.label, VALUES, None, case)[0], wanted)
    some = read_dataset(tmp_path, labels={5: "LEFT_LOBE"})
    for case in some.cases:
        counts = read_label_values(case.label, case).counts
        assert counts == {0: int((classes != 1).sum()), 5: int((classes == 1).sum())}
    with pytest.raises(InputError, match=r"of which none is declared .*data\.labels"):
        read_dataset(tmp_path, labels={1: "kidney"})


def test_slices_that_lie_loose_among_scans_are_refused(tmp_path):
    image, _ = make_case(0)
    write_series(tmp_path / "images", image)
    (tmp_path / "labels").mkdir()
    with pytest.raises(InputError, match="16 images of 1 DICOM series: put the slices"):
        read_dataset(tmp_path)


def test_a_tree_of_studies_is_listed_and_drafted(tmp_path):
    for index, patient in enumerate(("p1", "p2")):
        image, classes = make_case(index)
        study = tmp_path / "tree" / patient / "study"
        series = write_series(study / "ct", image)
        (study / "seg").mkdir()
        write_object(study / "seg" / "1.dcm", series, classes)
    write_series(tmp_path / "tree" / "p2" / "study" / "ct2", image + 1)
    code, said = run_command("check", tmp_path / "tree")
    assert code == 2
    assert said.count("24 x 28 x 16 in") == 3
    assert said.count("a segmentation in") == 2
    assert "Avasarala" not in said
    draft = tmp_path / "cases.csv"
    code, said = run_command("check", tmp_path / "tree", "--draft", draft)
    assert draft.read_text().splitlines()[1:] == [
        "p1_study_ct,tree/p1/study/ct,tree/p1/study/seg/1.dcm,p1,",
        "p2_study_ct,tree/p2/study/ct,tree/p2/study/seg/1.dcm,p2,",
        "p2_study_ct2,tree/p2/study/ct2,,p2,",
    ]
    code, said = run_command("check", draft)
    assert code == 0, said
    assert "left lobe" in said.lower()


def test_a_scan_is_its_files_to_the_cache(tmp_path):
    image, _ = make_case(0)
    series = write_series(tmp_path / "a", image)
    before = hash_source(series)
    assert hash_source(series) == before
    file = series / "1.dcm"
    file.write_bytes(file.read_bytes()[:-2] + b"\1\1")
    assert hash_source(series) != before
    write_nibabel(nib.Nifti1Pair, tmp_path / "f.img", image)
    before = hash_source(tmp_path / "f.hdr")
    write_nibabel(nib.Nifti1Pair, tmp_path / "f.img", image + 1)
    assert hash_source(tmp_path / "f.hdr") != before


@pytest.mark.parametrize("name", ["a.mhd", "a.mha", "a.nhdr", "a.nrrd"])
def test_voxels_in_a_folder_below_their_header_are_part_of_the_scan(tmp_path, name):
    (tmp_path / "raw").mkdir()
    voxels = tmp_path / "raw" / "v\N{LATIN SMALL LETTER E WITH ACUTE}.raw"
    voxels.write_bytes(bytes(24))
    meta = "NDims = 3\nDimSize = 2 3 4\nElementSpacing = 1 1 2\nElementType = MET_UCHAR\n"
    nrrd = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 3 4\nspace: RAS\nencoding: raw\n"
    nrrd += "space directions: (1,0,0) (0,1,0) (0,0,2)\nspace origin: (0,0,0)\n"
    header = f"{meta}ElementDataFile = raw/{voxels.name}\n" if name[2] == "m" else nrrd
    header += "" if name[2] == "m" else f"data file: ./raw\\{voxels.name}\n\n"
    path = tmp_path / name
    path.write_text(header, encoding="utf-8")
    before = hash_source(path)
    assert read_image([path], 1).array.sum() == 0
    voxels.write_bytes(bytes(23) + b"\1")
    assert read_image([path], 1).array.sum() == 1
    assert hash_source(path) != before


def test_all_kinds_are_named_where_none_is_found():
    assert KINDS.startswith("NIfTI (.nii, .nii.gz), DICOM, NRRD, MetaImage")


def test_names_that_count_as_one_are_refused(tmp_path):
    image, classes = make_case(0)
    series = write_series(tmp_path / "images" / "a", image)
    header = dicom_files.open_image(series, None).header
    (tmp_path / "labels").mkdir()
    names = {1: "Lobe", 2: "LOBE", 3: "core"}
    dicom_files.write(tmp_path / "labels" / "a.dcm", classes, AFFINE, header, "", names)
    with pytest.raises(InputError, match=r"a: the names \['LOBE', 'Lobe'\] count as one"):
        read_dataset(tmp_path)
    with pytest.raises(InputError, match=r"data\.labels: the names \['Core', 'core'\]"):
        read_dataset(tmp_path, labels={1: "core", 2: "Core"})


def test_a_region_of_number_0_is_a_class(tmp_path):
    image, classes = make_case(0)
    series = write_series(tmp_path / "images" / "a", image)
    path = tmp_path / "labels" / "a.rtstruct.dcm"
    path.parent.mkdir()
    write_object(path, series, classes)
    dataset = pydicom.dcmread(path)
    for element in dataset.iterall():
        if element.keyword in ("ROINumber", "ReferencedROINumber") and element.value == 1:
            element.value = 0
    dataset.save_as(path)
    read = read_dataset(tmp_path)
    assert read.labels == {0: "background", 1: "core", 2: "Left Lobe", 3: "right lobe"}
    label, _ = read_label(path, VALUES, None, read.cases[0])
    np.testing.assert_array_equal(label, np.array([0, 2, 3, 1])[classes])


def test_series_that_a_layout_does_not_name_are_noted_by_folder(mixed, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(mixed[0], root)
    write_series(root / "raw" / "old", make_case(0)[0])
    note, unclear = read_dataset(root, labels=NAMES).notes
    assert "do not tell the patients of DICOM apart" in unclear, "all have one PatientID here"
    assert note.startswith("1 scans are not read")
    assert "in the folders raw/old (1);" in note


def test_a_folder_of_bare_files_without_a_suffix_is_a_series(tmp_path):
    for number, one in enumerate(make_slices(make_case(0)[0], AFFINE)):
        one.file_meta, one.preamble = pydicom.dataset.FileMetaDataset(), None
        pydicom.dcmwrite(tmp_path / f"IM{number}", one, implicit_vr=False, little_endian=True)
    assert find_reader(tmp_path) is DICOM


def write_mixed(root, *names):
    """A scan and a label for each: in NIfTI where there are no names, else in NRRD with segments.

    Voxels of 1 are a box, those of 2 another one.
    """
    array = np.zeros((6, 6, 6), np.uint8)
    array[1:3, 1:3, 1:3], array[4, 4, 4] = 1, 2
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for index, named in enumerate(names):
        image = np.arange(array.size, dtype=np.float32).reshape(array.shape) + index
        nib.save(nib.Nifti1Image(image, AFFINE), root / "images" / f"p{index}.nii.gz")
        path = root / "labels" / f"p{index}.nii.gz"
        if named:
            nrrd.write(path.with_name(f"p{index}.seg.nrrd"), array, AFFINE, None, "", named)
        else:
            nib.save(nib.Nifti1Image(array, AFFINE), path)
    return root


def test_labels_without_names_wait_for_names_where_numbers_disagree(tmp_path):
    liver, kidney = {1: "liver", 2: "kidney"}, {1: "kidney", 2: "liver"}
    root = write_mixed(tmp_path / "a", None, liver, kidney)
    with pytest.raises(InputError, match=r"p0: .*kidney is 1, kidney is 2.* data\.labels\.1="):
        read_dataset(root)
    assert len(read_dataset(root, opens_files=False).cases) == 3, "a prediction opens no label"
    dataset = read_dataset(root, labels={1: "liver", 2: "kidney"})
    found = [read_label(c.label, (0, 1, 2), None, c)[0][4, 4, 4] for c in dataset.cases]
    assert found == [2, 2, 1]
    agreeing = read_dataset(write_mixed(tmp_path / "b", None, liver, liver))
    assert agreeing.labels == {0: "background", **liver}


def test_values_that_no_segment_has_are_no_class(tmp_path):
    root = write_mixed(tmp_path, {2: "liver"})
    case = read_dataset(root, labels={1: "liver"}).cases[0]
    for read in (read_label_values, lambda path, case: read_label(path, (0, 1), None, case)):
        with pytest.raises(InputError, match=r"values \[1\] belong to none of its segments"):
            read(case.label, case)
    classes, _ = read_label(case.label, (0, 2), 1, read_dataset(root).cases[0])
    assert (classes[1, 1, 1], classes[4, 4, 4]) == (IGNORE, 1)


def write_scans(root, *headers):
    """Series a, b, ... with these fields, and a label of each."""
    image, classes = make_case(0)
    for name, fields in zip("abcdef", headers, strict=False):
        slices = make_slices((image + 1000).astype(np.int16), AFFINE, **fields)[:2]
        series = save(root / "images" / name, slices)
        (root / "labels").mkdir(exist_ok=True)
        write_object(root / "labels" / f"{name}.dcm", series, classes[..., :2])
    return root


@pytest.mark.parametrize(
    ("headers", "patients", "unclear"),
    [
        (({"PatientID": "7"}, {"PatientID": "8"}, {"PatientID": "7 "}), "aba", ""),
        (({"PatientID": "ANON"}, {"PatientID": "8"}, {"PatientID": "anon"}), "abc", "a, c"),
        (({"PatientID": ""}, {"PatientID": "8"}, {"PatientID": ""}), "abc", "a, c"),
        (({"PatientID": "0815"},) * 3, "abc", "a, b, c"),
        (
            [{"PatientID": "0815", "StudyInstanceUID": f"1.{study}"} for study in (2, 3, 3)],
            "abb",
            "a, b, c",
        ),
    ],
)
def test_patients_of_dicom_are_told_by_their_headers(tmp_path, headers, patients, unclear):
    root = write_scans(tmp_path, *headers)
    dataset = read_dataset(root)
    assert "".join(case.patient_id for case in dataset.cases) == patients
    said = [f"{unclear}; each study counts as a patient" in note for note in dataset.notes]
    assert said == [True] * bool(unclear)
    draft = write_draft(root / "images", tmp_path / "draft.csv")
    assert (f"{unclear}; each study" in draft) == bool(unclear)
    rows = (tmp_path / "draft.csv").read_text().splitlines()[1:]
    assert "".join(row.split(",")[3] for row in rows) == patients


def test_a_name_or_a_list_tells_patients_before_a_header_does(tmp_path):
    root = write_scans(tmp_path, *({"PatientID": "7"},) * 2, {"PatientID": "8"})
    rows = ("a,images/a,P1", "b,images/b,", "c,images/c,")
    (root / "cases.csv").write_text("\n".join(("case_id,image,patient_id", *rows)))
    assert [case.patient_id for case in read_dataset(root).cases] == ["P1", "b", "c"]
