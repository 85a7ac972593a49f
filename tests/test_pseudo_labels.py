import errno
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medssl import runs
from medssl.config import FilterSection, InputError
from medssl.data import pseudo_labels
from medssl.data.pseudo_labels import (
    has_pseudo_label,
    is_whole,
    measure_agreement,
    write_pseudo_label,
)
from medssl.pseudo.gates import sum_classes
from medssl.runs import write_json

SHAPE = (5, 4, 3)


def write(folder, probs, uncertainty, teacher):
    """Write a pseudo-label in two parts, the uncertainty after the probs."""
    parts = [np.s_[:2, :, :], np.s_[2:, :, :]]
    said = [(box, probs[(slice(None), *box)], None) for box in parts]
    doubt = [(box, None, uncertainty[box]) for box in parts]
    write_pseudo_label(folder, probs.shape, iter(said + doubt), teacher)


def read(folder):
    probs, uncertainty = zip(*pseudo_labels.iterate_pseudo_label(folder), strict=True)
    return np.concatenate(probs, 1), np.concatenate(uncertainty)


def draw(seed=0):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(3), SHAPE).astype(np.float32)
    return np.moveaxis(probs, -1, 0), rng.random(SHAPE).astype(np.float32)


def test_a_pseudo_label_comes_back_within_its_precision(tmp_path):
    probs, uncertainty = draw()
    write(tmp_path / "a", probs, uncertainty, "t")
    found, doubt = read(tmp_path / "a")
    assert found.dtype == doubt.dtype == np.float32
    assert np.abs(found - probs).max() <= 0.5 / 255 + 1e-6
    assert np.abs(doubt - uncertainty).max() < 1e-3


def test_a_pseudo_label_belongs_to_the_teacher_that_made_it(tmp_path):
    assert not has_pseudo_label(tmp_path / "a", "t", (3, *SHAPE))
    write(tmp_path / "a", *draw(), "t")
    assert has_pseudo_label(tmp_path / "a", "t", (3, *SHAPE))
    assert not has_pseudo_label(tmp_path / "a", "other", (3, *SHAPE))


@pytest.mark.parametrize("last", ["probs.npy", "uncertainty.npy", "class_voxels.npz"])
def test_a_kill_while_writing_leaves_no_pseudo_label_that_looks_whole(tmp_path, monkeypatch, last):
    write(tmp_path / "a", *draw(0), "old")
    write_file = pseudo_labels.write_file

    def die(path, write):
        if path.name == last:
            raise KeyboardInterrupt
        write_file(path, write)

    monkeypatch.setattr(pseudo_labels, "write_file", die)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", *draw(1), "new")
    assert not has_pseudo_label(tmp_path / "a", "new", (3, *SHAPE))
    assert not has_pseudo_label(tmp_path / "a", "old", (3, *SHAPE))


@pytest.mark.parametrize("name", ["probs.npy", "uncertainty.npy", "class_voxels.npz", "meta.json"])
@pytest.mark.parametrize("how", ["overwrite", "cut", "remove", "flip"])
def test_a_pseudo_label_that_has_changed_is_not_whole(tmp_path, name, how):
    shape = (3, *SHAPE)
    write(tmp_path / "a", *draw(), "t")
    assert is_whole(tmp_path / "a", shape)
    path = tmp_path / "a" / name
    content = path.read_bytes()
    if how == "remove":
        path.unlink()
    elif how == "overwrite":
        path.write_bytes(b"[]" if name == "meta.json" else content[:-4] + b"\1\1\1\1")
    else:
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(content[:middle] + flipped * (how == "flip"))
    assert not is_whole(tmp_path / "a", shape)
    assert not has_pseudo_label(tmp_path / "a", "t", shape)


def test_a_pseudo_label_of_another_grid_is_not_whole_even_without_hashes(tmp_path):
    write(tmp_path / "a", *draw(), "t")
    write_json(tmp_path / "a" / "meta.json", {"teacher": "t", "stability": None})
    assert is_whole(tmp_path / "a", (3, *SHAPE))
    assert not is_whole(tmp_path / "a", (4, *SHAPE))
    np.save(tmp_path / "a" / "probs.npy", np.zeros((3, 2, 2, 2), np.uint8))
    assert not is_whole(tmp_path / "a", (3, *SHAPE))


def test_a_pseudo_label_that_is_gone_is_named_with_its_repair(tmp_path):
    with pytest.raises(InputError, match=r"probs\.npy: cannot be read.*done\.json"):
        read(tmp_path / "a")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_a_pseudo_label_of_non_finite_numbers_is_refused_and_not_written(tmp_path, bad, which):
    arrays = draw()
    arrays[which].flat[3] = bad
    with pytest.raises(FloatingPointError, match="a: a pseudo-label of non-finite numbers"):
        write(tmp_path / "a", *arrays, "t")
    assert not list((tmp_path / "a").iterdir())


def test_a_pseudo_label_in_parts_has_the_bytes_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(pseudo_labels, "_PIECE", 3 * 4 * 3 * 2)  # planes of two at once
    probs, uncertainty = draw()
    write(tmp_path / "a", probs, uncertainty, "t")
    np.save(tmp_path / "probs.npy", np.rint(probs * 255).astype(np.uint8))
    np.save(tmp_path / "uncertainty.npy", uncertainty.astype(np.float16))
    for name in ("probs.npy", "uncertainty.npy"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / name).read_bytes()
    stored = np.load(tmp_path / "probs.npy")
    np.testing.assert_array_equal(pseudo_labels.read_classes(tmp_path / "a"), stored.argmax(0))
    found, doubt = read(tmp_path / "a")
    np.testing.assert_array_equal(found, stored.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(doubt, np.load(tmp_path / "uncertainty.npy"))


def test_the_memory_of_a_pseudo_label_is_that_of_its_classes(tmp_path, monkeypatch):
    shape = (6, 128, 96, 96)
    monkeypatch.setattr(pseudo_labels, "_PIECE", 6 * 4 * 96 * 96)
    said = np.random.default_rng(0).dirichlet(np.ones(6), (4, 96, 96)).astype(np.float32)
    said = np.moveaxis(said, -1, 0)
    parts = ((np.s_[i : i + 4, :, :], said, said[0]) for i in range(0, 128, 4))
    tracemalloc.start()
    write_pseudo_label(tmp_path / "a", shape, parts, "t")
    sum_classes(pseudo_labels.iterate_pseudo_label(tmp_path / "a"), FilterSection())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 128 * 96 * 96, "bytes: less than a sixth of the probs"


def test_islands_become_background_and_stability_is_that_before(tmp_path):
    probs, uncertainty = draw()
    classes = probs.argmax(0).astype(np.uint8)
    islands = classes[1:4, 1:] == 2
    said = []
    write_pseudo_label(
        tmp_path / "a",
        probs.shape,
        [(np.s_[:, :, :], probs, uncertainty)],
        "t",
        find_islands=lambda found: [(np.s_[1:4, 1:, :], found[1:4, 1:] == 2)],
        measure_stability=lambda found: said.append(found.copy()) or 0.25,
    )
    np.testing.assert_array_equal(said, [classes])
    assert pseudo_labels.read_stability(tmp_path / "a") == 0.25
    expected = np.rint(probs * 255)
    expected[:, 1:4, 1:][:, islands] = np.array([255, 0, 0])[:, None]
    found, _ = pseudo_labels.map_pseudo_label(tmp_path / "a")
    np.testing.assert_array_equal(found, expected)


def test_a_full_disk_is_said_before_anything_is_mapped(tmp_path, monkeypatch):
    def fail(file, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs.os, "posix_fallocate", fail)
    with pytest.raises(InputError, match="full"):
        write(tmp_path / "a", *draw(), "t")
    assert not list((tmp_path / "a").iterdir())


def test_the_voxels_to_place_patches_on_are_voxels_of_their_class(tmp_path, monkeypatch):
    monkeypatch.setattr(pseudo_labels, "MOST_VOXELS", 4)
    probs, uncertainty = draw()
    write(tmp_path / "a", probs, uncertainty, "t")
    classes = read(tmp_path / "a")[0].argmax(0)
    with np.load(tmp_path / "a" / "class_voxels.npz", allow_pickle=False) as found:
        assert set(found.files) == {"1", "2"}
        for name in found.files:
            assert len(found[name]) == 4
            assert (classes[tuple(found[name].T)] == int(name)).all()


def test_a_pseudo_label_is_on_disk_as_the_design_says(tmp_path):
    write(tmp_path / "a", *draw(), "t")
    probs = np.load(tmp_path / "a" / "probs.npy", mmap_mode="r", allow_pickle=False)
    uncertainty = np.load(tmp_path / "a" / "uncertainty.npy", mmap_mode="r", allow_pickle=False)
    assert (probs.dtype, probs.shape) == (np.uint8, (3, *SHAPE))
    assert (uncertainty.dtype, uncertainty.shape) == (np.float16, SHAPE)


def test_agreement_worked_by_hand():
    first = np.array([0, 1, 1, 2, 0, 0])
    second = np.array([0, 1, 0, 2, 2, 0])
    assert measure_agreement(first, second, [1]) == pytest.approx(2 / 3)
    assert measure_agreement(first, second, [1, 2]) == pytest.approx(2 / 3)
    assert measure_agreement(first, first, [1, 2]) == 1.0
    assert measure_agreement(first * 0, first, [1, 2]) == 0.0
    assert measure_agreement(first * 0, first * 0, [1, 2]) == 1.0


maps = arrays(np.uint8, (3, 3), elements=st.integers(0, 2))


@given(maps, maps)
def test_agreement_is_symmetric_and_at_most_one(first, second):
    value = measure_agreement(first, second, [1, 2])
    assert value == measure_agreement(second, first, [1, 2])
    assert 0 <= value <= 1
    assert (value == 1) == np.array_equal(first, second)
