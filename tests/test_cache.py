import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import processes
import pytest

from medssl import ranks, runs
from medssl.config import IGNORE, InputError
from medssl.data import cache, files
from medssl.data.cache import (
    CachedCase,
    build_cache,
    list_places,
    map_array,
    read_class_voxels,
)
from medssl.data.cases import Case
from medssl.data.io import write_mask
from medssl.rounds import loop
from medssl.runs import FullDiskError, write_file
from medssl.transforms.geometry import to_native
from medssl.transforms.preprocess import Normalization, Preprocessing

RECIPE = Preprocessing(spacing=(1.0, 1.0, 2.0), normalization=(Normalization(kind="zscore"),))
AFFINE = np.array([[-1.0, 0, 0, 30], [0, -1, 0, -20], [0, 0, 2, 5], [0, 0, 0, 1]])


def write_case(folder, case_id="a", seed=0, labeled=True):
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    image = folder / f"{case_id}_image.nii.gz"
    label = folder / f"{case_id}_label.nii.gz"
    nib.save(nib.Nifti1Image(rng.gamma(2, 100, (12, 10, 8)).astype(np.float32), AFFINE), image)
    classes = rng.integers(0, 3, (12, 10, 8)).astype(np.uint8)
    classes[:2] = IGNORE
    write_mask(label, classes, AFFINE, (0, 4, 9))
    return Case(case_id, (image,), label if labeled else None, case_id)


def build(cases, folder, recipe=RECIPE, **options):
    settings = {"label_values": (0, 4, 9), "ignore": 255, "num_channels": 1, **options}
    return build_cache(cases, recipe, folder / "cache", **settings)


_opened: set[str] | None = None


def _note_open(event, arguments):
    if event == "open" and _opened is not None:
        _opened.add(os.path.basename(str(arguments[0])))


sys.addaudithook(_note_open)  # cannot be removed: the fixture switches it


@pytest.fixture
def opened(monkeypatch):
    """Return the names of all files that are opened from now on, by whatever means."""
    names: set[str] = set()
    monkeypatch.setattr(sys.modules[__name__], "_opened", names)
    return names


@pytest.fixture
def watch(monkeypatch):
    """Record which cases were preprocessed and which labels were read."""
    seen = {"images": [], "labels": []}
    read_image, read_label = cache.read_image, cache.read_label

    def watch_image(paths, num_channels):
        seen["images"].append(paths[0].name)
        return read_image(paths, num_channels)

    def watch_label(path, *options):
        seen["labels"].append(path.name)
        return read_label(path, *options)

    monkeypatch.setattr(cache, "read_image", watch_image)
    monkeypatch.setattr(cache, "read_label", watch_label)
    return seen


def test_an_entry_holds_image_label_and_geometry(tmp_path):
    case = write_case(tmp_path / "data")
    found = build([case], tmp_path)["a"]
    assert isinstance(found.image(), np.memmap)
    assert found.image().dtype == np.float16
    assert found.image().shape == (1, *found.shape) == (1, 12, 10, 8)
    assert found.native_shape == (12, 10, 8)
    np.testing.assert_array_equal(found.native_affine, AFFINE)
    assert found.spacing == (1, 1, 2)
    raw = nib.load(case.images[0]).get_fdata()
    np.testing.assert_allclose(found.percentiles, [np.percentile(raw, (0.5, 50, 99.5))], rtol=1e-5)
    label = found.label()
    assert label.dtype == np.uint8
    assert set(np.unique(label)) == {0, 1, 2, IGNORE}


def test_a_mask_of_a_cached_scan_lies_where_the_header_of_the_scan_says(tmp_path):
    image = nib.Nifti1Image(np.ones((5, 6, 7), np.int16), AFFINE)
    image.set_qform(np.diag([1.0, 1, 2, 1]), 3)
    image.header["xyzt_units"] = 3
    image = nib.Nifti1Image(image.dataobj, None, image.header)
    image.header["qoffset_x"] = np.nan
    image.set_sform(AFFINE / 7, 4)
    path = tmp_path / "a.nii.gz"
    nib.save(image, path)
    own_spacing = RECIPE.model_copy(update={"spacing": (None, None, None)})
    for _ in range(2):  # made, then read from its description
        case = build([Case("a", (path,), None, "a")], tmp_path, own_spacing)["a"]
    write_mask(
        tmp_path / "m.nii.gz",
        np.ones(case.native_shape, np.uint8),
        case.native_affine,
        (0, 1),
        header=case.native_header,
    )
    scan, mask = nib.load(path).header, nib.load(tmp_path / "m.nii.gz").header
    for field in ("qform_code", "sform_code", "qoffset_x", "quatern_b", "srow_x", "xyzt_units"):
        np.testing.assert_array_equal(mask[field], scan[field])
    np.testing.assert_array_equal(mask["pixdim"][:4], scan["pixdim"][:4])


def test_float16_keeps_the_image_to_a_thousandth(tmp_path):
    case = write_case(tmp_path / "data")
    found = build([case], tmp_path)["a"]
    whole = cache.preprocess_image(cache.read_image(case.images, 1), RECIPE).array
    np.testing.assert_allclose(found.image(), whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("labeled", "most"), [(False, 10), (True, 11)])
def test_the_memory_of_caching_is_that_of_two_copies_of_the_scan(
    tmp_path, monkeypatch, labeled, most
):
    shape = (128, 120, 100)
    label = np.zeros(shape, np.uint8)
    for index in range(1, 6):
        label[20 * index :, 10 * index :, 10 * index :] = index
    nib.save(nib.Nifti1Image(label.astype(np.int16) * 100, AFFINE), tmp_path / "a.nii")
    write_mask(tmp_path / "l.nii", label, AFFINE, tuple(range(6)))
    how = Normalization(kind="ct", low=0, high=600, mean=0, std=300)
    recipe = Preprocessing(spacing=(1.1, 1.1, 2.0), normalization=(how,))
    scan = Case("a", (tmp_path / "a.nii",), None, "a")
    settings = {"recipe": recipe, "label_values": tuple(range(6))}
    if labeled:
        build([scan], tmp_path, **settings)
        scan = Case("a", scan.images, tmp_path / "l.nii", "a")
    taken, take = [], cache._Room.take

    def watch_take(room, size, case_id):
        taken.append(size)
        return take(room, size, case_id)

    monkeypatch.setattr(cache._Room, "take", watch_take)
    tracemalloc.start()
    build([scan], tmp_path, **settings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak / label.size < most, "bytes a voxel"
    assert 0.7 < peak / taken[0] < 1.05
    assert len(taken) == 1


@pytest.mark.parametrize("most", [5, 10_000])
def test_voxels_of_a_class_are_drawn_as_from_a_list_of_them_all(most):
    label = np.random.default_rng(0).integers(0, 3, (9, 8, 7)).astype(np.uint8)
    label[3:6] = 0
    for index in range(4):
        every = np.argwhere(label == index)
        if len(every) > most:
            every = every[np.sort(np.random.default_rng(1).choice(len(every), 5, replace=False))]
        found = cache.draw_class_voxels(label, index, most, np.random.default_rng(1))
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, every)


def test_the_voxel_lists_point_at_their_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MAX_CLASS_VOXELS", 50)
    found = build([write_case(tmp_path / "data")], tmp_path)["a"]
    voxels = found.class_voxels()
    assert set(voxels) == {1, 2}
    for index, where in voxels.items():
        assert where.dtype == np.int32
        assert len(np.unique(where, axis=0)) == len(where) == 50
        assert (found.label()[tuple(where.T)] == index).all()


def test_the_second_time_nothing_is_preprocessed(tmp_path, watch):
    cases = [write_case(tmp_path / "data", name, seed) for seed, name in enumerate("ab")]
    first = build(cases, tmp_path)
    second = build(cases, tmp_path)
    assert {kind: sorted(names) for kind, names in watch.items()} == {
        "images": ["a_image.nii.gz", "b_image.nii.gz"],
        "labels": ["a_label.nii.gz", "b_label.nii.gz"],
    }
    for name in "ab":
        assert second[name].folder == first[name].folder
        np.testing.assert_array_equal(second[name].affine, first[name].affine)
        assert second[name].percentiles == first[name].percentiles
        assert second[name].native_shape == first[name].native_shape


def test_a_second_start_reads_each_file_once_and_writes_none(tmp_path, monkeypatch):
    cases = [write_case(tmp_path / "data", name, seed) for seed, name in enumerate("abc")]
    build(cases, tmp_path)
    sources = {path for case in cases for path in (*case.images, case.label)}
    entries = {path for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in entries}
    hashed, real = [], runs.hash_file

    def hash_file(path):
        hashed.append(path)
        return real(path)

    for module in (runs, files):
        monkeypatch.setattr(module, "hash_file", hash_file)
    for name in ("read_image", "read_label", "read_geometry", "write_file"):
        monkeypatch.setattr(cache, name, None)
    build(cases, tmp_path)
    assert sorted(hashed) == sorted(sources | {path for path in entries if path.suffix != ".json"})
    after = {path for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in after} == before


def test_a_changed_scan_is_preprocessed_again(tmp_path, watch):
    case = write_case(tmp_path / "data")
    before = np.array(build([case], tmp_path)["a"].image())
    changed = write_case(tmp_path / "data", seed=5)
    after = build([changed], tmp_path)["a"].image()
    assert len(watch["images"]) == 2
    assert not np.array_equal(before, after)


def test_a_scan_of_the_same_size_and_time_does_not_fool_the_cache(tmp_path, watch):
    case = write_case(tmp_path / "data")
    path = tmp_path / "data" / "a.nii"
    case = Case("a", (path,), None, "a")
    for value in (1, 2):
        array = np.arange(96, dtype=np.float32).reshape(4, 4, 6) ** value
        nib.save(nib.Nifti1Image(array, AFFINE), path)
        os.utime(path, (1e9, 1e9))
        build([case], tmp_path)
    assert len(watch["images"]) == 2


def test_a_changed_label_is_read_again_and_the_image_is_not(tmp_path, watch):
    case = write_case(tmp_path / "data")
    build([case], tmp_path)
    write_mask(case.label, np.full((12, 10, 8), 2, np.uint8), AFFINE, (0, 4, 9))
    found = build([case], tmp_path)["a"]
    assert (found.label() == 2).all()
    assert set(found.class_voxels()) == {2}
    assert len(watch["labels"]) == 2
    assert len(watch["images"]) == 1


def find_file(case, name):
    (path,) = case.folder.rglob(name)
    return path


def test_what_a_run_reads_is_not_changed_by_another(tmp_path):
    case = write_case(tmp_path / "data")
    mine = build([case], tmp_path)["a"]
    image, label, voxels = np.array(mine.image()), np.array(mine.label()), mine.class_voxels()
    build([case], tmp_path, label_values=(0, 9, 4))  # another label map
    build([write_case(tmp_path / "other", seed=7)], tmp_path)  # another data set, same case_id
    np.testing.assert_array_equal(mine.image(), image)
    np.testing.assert_array_equal(mine.label(), label)
    assert {k: v.tolist() for k, v in mine.class_voxels().items()} == {
        k: v.tolist() for k, v in voxels.items()
    }


def test_other_label_values_read_the_label_again(tmp_path):
    case = write_case(tmp_path / "data")
    first = np.array(build([case], tmp_path)["a"].label())
    second = build([case], tmp_path, label_values=(0, 9, 4))["a"].label()
    np.testing.assert_array_equal(first == 1, second == 2)


@pytest.mark.parametrize("name", ["image.npy", "label.npy", "class_voxels.npz"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "other"])
def test_a_damaged_file_is_silently_made_again(tmp_path, name, damage):
    case = write_case(tmp_path / "data")
    path = find_file(build([case], tmp_path)["a"], name)
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": whole[:-10], "empty": b"", "other": b"garbage" * 99}[damage])
    found = build([case], tmp_path)["a"]
    if name.endswith(".npy"):
        assert path.read_bytes() == whole
    assert set(found.class_voxels()) == {1, 2}


@pytest.mark.parametrize("name", ["image.npy", "label.npy", "class_voxels.npz", "meta.json"])
def test_a_file_of_the_same_size_and_kind_with_other_content_is_not_believed(tmp_path, name):
    case = write_case(tmp_path / "data")
    entry = build([case], tmp_path)["a"]
    folder = entry.folder if name in ("image.npy", "meta.json") else entry.label_folder
    path = folder / name
    content = path.read_bytes()
    if name == "meta.json":
        path.write_bytes(content.replace(b"-20.0", b"-30.0"))
    else:
        path.write_bytes(content[:-4] + bytes(byte ^ 1 for byte in content[-4:]))
    assert path.read_bytes() != content
    again = build([case], tmp_path)["a"]
    assert path.read_bytes() == content
    np.testing.assert_array_equal(again.native_affine, AFFINE)


def test_a_cached_scan_that_vanishes_while_it_is_used_is_named(tmp_path):
    entry = build([write_case(tmp_path / "data")], tmp_path)["a"]
    shutil.rmtree(entry.folder)
    for read in (entry.image, entry.label, entry.class_voxels):
        with pytest.raises(InputError, match=r"cannot be read.*the same command makes it anew"):
            read()


@pytest.mark.parametrize("name", ["image.npy", "label.npy"])
@pytest.mark.parametrize("left", [0, 0.1, 0.9])
def test_a_cached_file_that_is_cut_while_it_is_used_is_named(tmp_path, name, left):
    entry = build([write_case(tmp_path / "data")], tmp_path)["a"]
    path = find_file(entry, name)
    os.truncate(path, int(left * path.stat().st_size))
    with pytest.raises(InputError, match=rf"{name}: cannot be read.*makes it anew"):
        entry.image() if name == "image.npy" else entry.label()


def test_what_a_kill_left_in_the_cache_is_removed_once_it_is_old(tmp_path, leave):
    case = write_case(tmp_path / "data")
    left = leave(build([case], tmp_path)["a"].folder, "image.npy")
    build([case], tmp_path)
    assert not left.exists()


@pytest.mark.parametrize("name", ["meta.json", "label.json"])
def test_an_entry_without_its_last_file_is_not_believed(tmp_path, watch, name):
    case = write_case(tmp_path / "data")
    path = find_file(build([case], tmp_path)["a"], name)
    for damaged in ("", "[1]", "{}"):
        path.write_text(damaged)
        build([case], tmp_path)
    assert len(watch["images" if name == "meta.json" else "labels"]) == 4


def test_another_recipe_has_other_entries(tmp_path, monkeypatch):
    case = write_case(tmp_path / "data")
    first = build([case], tmp_path)["a"]
    other = RECIPE.model_copy(update={"spacing": (2.0, 2.0, 2.0)})
    second = build([case], tmp_path, other)["a"]
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    third = build([case], tmp_path)["a"]
    assert len({first.folder, second.folder, third.folder}) == 3
    assert first.image().shape == (1, 12, 10, 8)
    assert second.image().shape == (1, 6, 5, 8)


def test_an_unlabeled_case_opens_no_label_not_even_that_of_another_run(tmp_path, opened):
    case = write_case(tmp_path / "data")
    folder = build([case], tmp_path)["a"].folder
    labels = {"a_label.nii.gz", "label.npy", "label.json", "class_voxels.npz"}
    opened.clear()
    found = build([case.without_label()], tmp_path)["a"]
    assert found.folder == folder
    assert found.label() is None
    assert found.class_voxels() == {}
    found.image()
    assert {"a_image.nii.gz", "image.npy"} <= opened
    assert not labels & opened
    build([case], tmp_path)["a"].class_voxels()
    assert labels <= opened, "the hook would have seen them"


def test_an_unlabeled_case_gets_no_label_file(tmp_path):
    found = build([write_case(tmp_path / "data", labeled=False)], tmp_path)["a"]
    assert {path.name for path in found.folder.iterdir()} == {"image.npy", "meta.json"}


def test_a_case_that_becomes_labeled_keeps_its_image(tmp_path, watch):
    case = write_case(tmp_path / "data")
    build([case.without_label()], tmp_path)
    found = build([case], tmp_path)["a"]
    assert found.label() is not None
    assert len(watch["images"]) == 1


def test_all_bad_cases_stand_in_one_message(tmp_path):
    good = write_case(tmp_path / "data", "good")
    gone = Case("gone", (tmp_path / "nowhere.nii.gz",), None, "gone")
    label = tmp_path / "data" / "wide.nii.gz"
    write_mask(label, np.zeros((13, 10, 8), np.uint8), AFFINE, (0,))
    wide = Case("wide", good.images, label, "wide")
    beside = tmp_path / "data" / "beside.nii.gz"
    write_mask(beside, np.zeros((12, 10, 8), np.uint8), np.eye(4), (0,))
    far = Case("far", good.images, beside, "far")
    outside = Case("../up", good.images, None, "up")
    with pytest.raises(InputError) as raised:
        build([gone, good, wide, far, outside], tmp_path)
    message = str(raised.value)
    assert message.startswith("4 of 5 cases cannot be used:")
    for part in ("gone: ", "nowhere.nii.gz", "wide: ", "(13, 10, 8)", "far: ", "voxels beside"):
        assert part in message
    assert "../up: " in message
    assert not (tmp_path / "up").exists()


def test_a_full_disk_is_said_once_and_not_of_each_case(tmp_path, monkeypatch):
    cases = [write_case(tmp_path / "data", name) for name in ("a", "b", "c")]

    def fill(*_):
        raise FullDiskError("the disk is full: 0.0 MiB free")

    monkeypatch.setattr(cache, "_make_image", fill)
    with pytest.raises(FullDiskError, match=r"^the disk is full: 0\.0 MiB free$"):
        build(cases, tmp_path)


def test_a_label_off_by_a_hair_is_taken_voxel_by_voxel(tmp_path):
    case = write_case(tmp_path / "data")
    straight = np.array(build([case], tmp_path)["a"].label())
    classes = np.asarray(nib.load(case.label).dataobj)
    hair = AFFINE.copy()
    hair[:3, 3] += 0.03
    nib.save(nib.Nifti1Image(classes, hair), case.label)
    np.testing.assert_array_equal(build([case], tmp_path)["a"].label(), straight)


def test_progress_is_reported_after_each_case(tmp_path):
    cases = [write_case(tmp_path / "data", name) for name in "abc"]
    seen = []
    build(cases, tmp_path, report=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def build_in_a_process(case, folder, queue):
    found: CachedCase = build([case], folder)["a"]
    queue.put((np.array(found.image()).tobytes(), np.array(found.label()).tobytes()))


def test_builders_of_the_same_entry_do_no_harm(tmp_path):
    case = write_case(tmp_path / "data")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    builders = [
        context.Process(target=build_in_a_process, args=(case, tmp_path, queue)) for _ in range(4)
    ]
    for builder in builders:
        builder.start()
    results = {queue.get(timeout=60) for _ in builders}
    for builder in builders:
        builder.join()
    found = build([case], tmp_path)["a"]
    assert results == {(np.array(found.image()).tobytes(), np.array(found.label()).tobytes())}
    assert {path.name for path in found.folder.rglob("*") if path.is_file()} == {
        "image.npy",
        "meta.json",
        "label.npy",
        "class_voxels.npz",
        "label.json",
    }


def test_an_entry_that_another_process_makes_once_more_stays_whole(tmp_path, monkeypatch):
    case = write_case(tmp_path / "data")
    entry = build([case], tmp_path)["a"]
    for path in (entry.folder / "image.npy", entry.label_folder / "label.npy"):
        os.truncate(path, 200)
    save, read = cache._save, []

    def read_meanwhile(path, array):
        save(path, array)
        read.append([path.name, len(cache.read_sources(entry))])

    monkeypatch.setattr(cache, "_save", read_meanwhile)
    build([case], tmp_path)
    assert read == [["image.npy", 2], ["label.npy", 2]]


def test_scans_are_held_against_their_hashes_at_the_same_time(tmp_path, monkeypatch):
    cases = [write_case(tmp_path / "data", case_id=name) for name in ("a", "b")]
    first = build(cases, tmp_path)
    together = threading.Barrier(2, timeout=20)
    real = cache.find_changed

    def find_changed(folder, mark):
        if (folder / "meta.json").is_file():
            together.wait()  # would break if one case waited for the other
        return real(folder, mark)

    monkeypatch.setattr(cache, "find_changed", find_changed)
    monkeypatch.setattr(cache, "count_cores", lambda: 2)
    again = build(cases, tmp_path)
    assert [entry.folder for entry in again.values()] == [e.folder for e in first.values()]
    assert list(again) == ["a", "b"]


def test_cases_are_made_at_the_same_time(tmp_path, monkeypatch):
    together, real = threading.Barrier(2, timeout=20), cache.preprocess_image

    def preprocess(*arguments, **options):
        together.wait()  # would break if one case waited for the other
        return real(*arguments, **options)

    monkeypatch.setattr(cache, "preprocess_image", preprocess)
    monkeypatch.setattr(cache, "count_cores", lambda: 2)
    assert list(build([write_case(tmp_path / "data", name) for name in "ab"], tmp_path)) == [
        "a",
        "b",
    ]


def test_any_number_of_cores_makes_the_same_files(tmp_path, monkeypatch):
    cases = [write_case(tmp_path / "data", name, seed) for seed, name in enumerate("abcde")]
    folders = [tmp_path / "one", tmp_path / "three"]
    monkeypatch.setattr(cache, "MAX_CLASS_VOXELS", 50)  # so that they are drawn
    for cores, folder in zip((1, 3), folders, strict=True):
        monkeypatch.setattr(cache, "count_cores", lambda cores=cores: cores)
        build(cases, folder)
    one, three = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in folders
    )
    assert len(one) == 5 * 5
    assert one == three


@pytest.mark.parametrize(
    ("room", "most", "words"),
    [
        (0.5, 1, "a takes 0.0 GB while it is cached, and 0.0 GB may be taken: if the system kills"),
        (1.5, 1, "note: memory bounds the scans at a time: "),
        (2.5, 2, "note: memory bounds the scans at a time: "),
        (9, 3, ""),
    ],
)
def test_no_more_cases_are_made_at_a_time_than_memory_is_free_for(
    tmp_path, monkeypatch, capsys, room, most, words
):
    cases = [write_case(tmp_path / "data", name, labeled=False) for name in "abcdef"]
    size = cache._measure_image(cases[0], RECIPE)
    monkeypatch.setattr(cache, "count_free_memory", lambda: room * size / cache.SHARE)
    monkeypatch.setattr(cache, "count_cores", lambda: 3)
    active, peak, real = set(), [], cache.preprocess_image
    together = threading.Barrier(most, timeout=20)

    def preprocess(*arguments, **options):
        active.add(threading.get_ident())
        peak.append(len(active))
        together.wait()
        time.sleep(0.05)
        active.discard(threading.get_ident())
        return real(*arguments, **options)

    monkeypatch.setattr(cache, "preprocess_image", preprocess)
    assert list(build(cases, tmp_path)) == list("abcdef")
    assert max(peak) == most
    said = capsys.readouterr().err
    assert (words in said) if words else not said


def test_who_stops_loses_no_case_that_was_begun_and_begins_no_other(tmp_path, monkeypatch, watch):
    cases = [write_case(tmp_path / "data", name) for name in "abcdef"]
    monkeypatch.setattr(cache, "count_cores", lambda: 2)

    def stop(done, total):
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        build(cases, tmp_path, report=stop)
    assert len(watch["images"]) <= 4
    build(cases, tmp_path)
    assert sorted(watch["images"]) == [f"{name}_image.nii.gz" for name in "abcdef"]


def test_who_stops_does_not_wait_for_memory(tmp_path, monkeypatch, watch):
    cases = [write_case(tmp_path / "data", name, labeled=False) for name in "abcdef"]
    monkeypatch.setattr(cache, "count_cores", lambda: 3)
    monkeypatch.setattr(cache, "count_free_memory", lambda: 1.0)
    stopped, real = threading.Event(), cache.preprocess_image

    def preprocess(*arguments, **options):
        stopped.wait(0.2)  # the other two threads come to wait for this one
        return real(*arguments, **options)

    def stop(done, total):
        raise ValueError("stop")

    monkeypatch.setattr(cache, "preprocess_image", preprocess)
    with pytest.raises(ValueError, match="stop"):
        build(cases, tmp_path, report=stop)
    assert len(watch["images"]) <= 2


def test_a_case_that_memory_does_not_suffice_for_is_named(tmp_path, monkeypatch):
    cases = [write_case(tmp_path / "data", name) for name in "ab"]
    real = cache.measure_percentiles
    fails = iter([True, False])

    def measure(volume):
        if next(fails):
            raise MemoryError("Unable to allocate 9 TiB")
        return real(volume)

    monkeypatch.setattr(cache, "measure_percentiles", measure)
    monkeypatch.setattr(cache, "count_cores", lambda: 1)
    with pytest.raises(InputError, match=r"1 of 2 cases.*\n  a: out of memory: end other.*9 TiB"):
        build(cases, tmp_path)


INTERRUPTED = """
import itertools, sys, time
from pathlib import Path
from medssl.data import cache
from test_cache import build, write_case

folder = Path(sys.argv[1])
cases = [write_case(folder / "data", name) for name in "abc"]
real, calls = cache.preprocess_image, itertools.count()

def preprocess(*arguments, **options):
    if next(calls):
        while not (folder / "done").exists():
            time.sleep(0.1)
        (folder / "asleep").touch()
        time.sleep(60)
    return real(*arguments, **options)

def report(done, total):
    (folder / "done").touch()

cache.preprocess_image, cache.count_cores = preprocess, lambda: 2
build(cases, folder, report=report)
"""


@pytest.mark.slow
def test_ctrl_c_waits_for_no_case(tmp_path):
    process = processes.Process("-c", INTERRUPTED, tmp_path, cwd=Path(__file__).parent)
    try:
        while not (tmp_path / "asleep").exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == -signal.SIGINT
    finally:
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.rglob("meta.json")), "what was finished stands"


def test_a_file_that_was_written_anew_is_read_anew(tmp_path):
    for number in (1, 2):
        write_file(tmp_path / "image.npy", lambda path, n=number: np.save(path, np.full(3, n)))
        write_file(tmp_path / "class_voxels.npz", lambda p, n=number: save_voxels(p, n))
        assert map_array(tmp_path / "image.npy").tolist() == 3 * [number]
        assert read_class_voxels(tmp_path)[number].tolist() == [[number, 0, 0]]
    columns = np.arange(6).reshape(2, 3).T
    np.save(tmp_path / "columns.npy", columns)
    for _ in range(2):
        assert np.array_equal(map_array(tmp_path / "columns.npy"), columns)


def save_voxels(path, number):
    with path.open("wb") as file:
        np.savez(file, **{str(number): np.array([[number, 0, 0]])})


def test_a_map_that_is_open_survives_a_rebuild(tmp_path):
    case = write_case(tmp_path / "data")
    image = build([case], tmp_path)["a"].image()
    before = image.copy()
    build([write_case(tmp_path / "data", seed=3)], tmp_path)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("angle", [0, 25], ids=["LPS", "oblique"])
def test_a_box_comes_back_from_a_warm_cache_with_dice_above_99_percent(tmp_path, angle, watch):
    turn = nib.eulerangles.euler2mat(np.radians(angle), np.radians(angle / 2), 0)
    affine = nib.affines.from_matvec(turn @ np.diag([-0.9, -0.9, 2.5]), [11, -40, 900])
    shape = (60, 56, 22)
    box = np.zeros(shape, dtype=np.uint8)
    box[14:44, 16:40, 5:16] = 1
    nib.save(nib.Nifti1Image(box.astype(np.int16) * 500 + 20, affine), tmp_path / "box.nii.gz")
    case = Case("box", (tmp_path / "box.nii.gz",), None, "box")
    recipe = RECIPE.model_copy(update={"spacing": (1.0, 1.0, 1.0)})
    build([case], tmp_path, recipe)
    found = build([case], tmp_path, recipe)["box"]
    assert len(watch["images"]) == 1
    values = found.image().astype(np.float32)
    foreground = (values - values.min()) / (values.max() - values.min())
    probs = np.concatenate([1 - foreground, foreground])
    native = to_native(probs, found.affine, found.native_shape, found.native_affine).argmax(0)
    assert native.shape == shape
    np.testing.assert_allclose(found.native_affine, affine, atol=1e-4)
    assert 2 * (native & box).sum() / (native.sum() + box.sum()) >= 0.99


@pytest.mark.parametrize("num_seen", [0, 1, 2])
def test_of_several_processes_each_hashes_the_scans_that_are_dealt_to_it(
    tmp_path, monkeypatch, stop_at, num_seen
):
    cases = [
        write_case(tmp_path / "scans", name, seed, labeled=seed < 2)
        for seed, name in enumerate("abcd")
    ]
    whole = build(cases, tmp_path)
    theirs = list_places({case.case_id: whole[case.case_id] for case in cases[0::2]})[:num_seen]
    monkeypatch.setattr(ranks, "find_rank", lambda: (1, 2))
    monkeypatch.setattr(ranks, "pool", lambda items: items if items == [False] else theirs + items)
    hashed, hash_source = [], cache.hash_source
    monkeypatch.setattr(cache, "hash_source", lambda path: hashed.append(path) or hash_source(path))
    plan = SimpleNamespace(preprocessing=RECIPE, label_values=(0, 4, 9), ignore=255, channels=("",))
    cached = loop._cache_cases(cases, plan, tmp_path / "cache", stop_at(None))
    unseen = cases[0::2][num_seen:]  # on a slow network disk
    assert set(hashed) == {
        path for case in (*cases[1::2], *unseen) for path in (*case.images, case.label) if path
    }
    assert list(cached) == list("abcd")
    for case_id, case in cached.items():
        assert (case.folder, case.label_folder) == (
            whole[case_id].folder,
            whole[case_id].label_folder,
        )
        assert (case.label() is None) == (case_id in "cd")
