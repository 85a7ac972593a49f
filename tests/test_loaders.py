from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medssl.config import IGNORE, InputError, RandAugmentSection
from medssl.data import loaders
from medssl.data.cache import CachedCase
from medssl.data.loaders import (
    PatchDataset,
    Sampling,
    UnlabeledCase,
    explain_killed_loader,
    iterate_batches,
)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for part in first:
        if first[part] is None:
            assert second[part] is None
            continue
        assert first[part].keys() == second[part].keys()
        for key in first[part]:
            assert torch.equal(first[part][key], second[part][key]), (part, key)


def test_a_batch_has_the_shapes_and_dtypes_of_the_contract(make_dataset):
    batch = make_dataset(batch=2, num_unlabeled=3)[0]
    shapes = {
        part: {key: (tuple(value.shape), value.dtype) for key, value in batch[part].items()}
        for part in batch
    }
    image, voxels = (1, 8, 8, 8), (1, 8, 8, 8)
    assert shapes["labeled"] == {
        "image": ((2, *image), torch.float32),
        "label": ((2, *voxels), torch.uint8),
        "weight": ((2, *voxels), torch.float32),
    }
    assert shapes["unlabeled"] == {
        "weak": ((3, *image), torch.float32),
        "strong": ((3, *image), torch.float32),
        "weight": ((3, *voxels), torch.float32),
        "probs": ((3, 3, 8, 8, 8), torch.float32),
        "uncertainty": ((3, *voxels), torch.float32),
    }


def read_memory(field):
    """Return VmRSS, or its peak VmHWM, of this process in bytes."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="nobody tells the peak here")
def test_patches_are_cut_from_files_of_which_the_rest_is_not_read(tmp_path):
    shape = (600, 500, 600)
    arrays = {
        "image": ((1, *shape), np.float16),
        "label": (shape, np.uint8),
        "probs": ((3, *shape), np.uint8),
        "uncertainty": (shape, np.float16),
    }
    for name, (size, dtype) in arrays.items():  # files with holes: 2.2 GB that no disk holds
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", dtype, size)
    voxels = np.random.default_rng(0).integers(0, 500, (100, 3), np.int32)
    np.savez(tmp_path / "class_voxels.npz", **{"1": voxels})
    place = (shape, np.eye(4))
    case = CachedCase("a", tmp_path, *place, *place, ((0.0, 1.0, 2.0),), tmp_path)
    sampling = Sampling(0, 1, (16, 16, 16), 2, 2, 0.5, 1.0, (0, 1, 2))
    dataset = PatchDataset([case], [UnlabeledCase(case, tmp_path)], sampling)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = read_memory("VmRSS")
    for step in range(4):
        assert dataset[step]["unlabeled"]["probs"].shape == (2, 3, 16, 16, 16)
    smallest = np.prod(shape)
    assert read_memory("VmHWM") - before < smallest / 3


def test_round_zero_has_no_unlabeled_part(make_dataset):
    assert make_dataset(round_index=0)[0]["unlabeled"] is None


def test_any_number_of_workers_gives_the_same_batches(make_dataset):
    runs = [
        list(iterate_batches(make_dataset(), 0, 4, num_workers, pin_memory=False))
        for num_workers in (0, 2)
    ]
    assert len(runs[0]) == len(runs[1]) == 4
    for first, second in zip(*runs, strict=True):
        assert_same(first, second)


@pytest.mark.parametrize(("room", "expected"), [(99.0, 3), (2.5, 2), (0.5, 0)])
def test_no_more_loaders_are_started_than_have_room_in_shared_memory(
    make_dataset, monkeypatch, capsys, room, expected
):
    dataset = make_dataset()
    size = sum(x.nbytes for part in dataset[0].values() for x in part.values())
    usage = SimpleNamespace(free=room * 2 * 4 * size)  # half of it for 4 batches of each
    monkeypatch.setattr(loaders, "_SHARED", Path(__file__).parent)
    monkeypatch.setattr(loaders.shutil, "disk_usage", lambda path: usage)
    started = []

    class Watched(loaders.DataLoader):
        def __init__(self, *args, num_workers, **kwargs):
            started.append(num_workers)
            super().__init__(*args, num_workers=0, **{**kwargs, "prefetch_factor": None})

    monkeypatch.setattr(loaders, "DataLoader", Watched)
    assert len(list(iterate_batches(dataset, 0, 2, 3, False))) == 2
    assert started == [expected]
    said = capsys.readouterr().err
    assert said == "" if expected == 3 else f"{expected} are started, not 3; give" in said


def kill_loader(*args, **kwargs):
    """Fail as torch does when it comes to know that a loader process was killed."""
    try:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is")
    except RuntimeError as error:
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly") from error


def lose_loader(*args, **kwargs):
    """Fail as the way to a loader process does that was killed with a batch in its hand."""
    yield from ()
    raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize(
    ("fail", "words"), [(kill_loader, r"killed \(Bus error\): "), (lose_loader, "killed: ")]
)
def test_a_loader_that_is_killed_is_a_sentence(make_dataset, monkeypatch, fail, words):
    monkeypatch.setattr(loaders, "DataLoader", fail)
    match = f"a loader process was {words}.*train.workers=0"
    with pytest.raises(InputError, match=match), explain_killed_loader():
        list(iterate_batches(make_dataset(), 0, 4, 1, False))


def test_an_error_that_is_not_of_a_killed_loader_stays_what_it_is(make_dataset, monkeypatch):
    monkeypatch.setattr(loaders, "DataLoader", lose_loader)
    with pytest.raises(ConnectionResetError), explain_killed_loader():
        list(iterate_batches(make_dataset(), 0, 4, 0, False))
    with pytest.raises(RuntimeError, match="of the network"), explain_killed_loader():
        raise RuntimeError("of the network")


def test_batches_from_a_later_step_on_are_those_of_an_uninterrupted_run(make_dataset):
    whole = list(iterate_batches(make_dataset(), 0, 4, 0, pin_memory=False))
    rest = list(iterate_batches(make_dataset(), 2, 4, 0, pin_memory=False))
    for first, second in zip(whole[2:], rest, strict=True):
        assert_same(first, second)


def test_what_was_drawn_before_does_not_change_a_batch(make_dataset):
    dataset = make_dataset()
    first = dataset[3]
    dataset[7]
    torch.manual_seed(5)
    np.random.seed(5)
    assert_same(first, dataset[3])


@pytest.mark.parametrize("change", [{"seed": 1}, {"round_index": 2}])
def test_another_seed_or_round_gives_other_patches(make_dataset, change):
    first, second = make_dataset()[0], make_dataset(**change)[0]
    assert not torch.equal(first["labeled"]["image"], second["labeled"]["image"])
    assert not torch.equal(first["unlabeled"]["strong"], second["unlabeled"]["strong"])


def test_every_case_is_used_once_per_pass(make_dataset):
    dataset = make_dataset(num_unlabeled=2)
    places = [(step, index) for step in range(6) for index in range(2)]
    chosen = [dataset._choose(3, "unlabeled", *place) for place in places]
    passes = [chosen[start : start + 3] for start in range(0, 12, 3)]
    assert all(sorted(one) == [0, 1, 2] for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_label_and_image_of_a_patch_belong_together(make_dataset):
    bright, dark = [], []
    for step in range(12):
        part = make_dataset(foreground=1.0)[step]["labeled"]
        counted = part["weight"] > 0
        bright.append(part["image"][counted & (part["label"] == 2)])
        dark.append(part["image"][counted & (part["label"] == 0)])
    assert torch.cat(bright).mean() > torch.cat(dark).mean() + 1.0


def test_pseudo_label_and_weak_view_of_a_patch_belong_together(make_dataset):
    part = make_dataset(foreground=1.0)[0]["unlabeled"]
    counted = (part["weight"] > 0)[:, 0]
    lesion = counted & (part["probs"].argmax(1) == 2)
    rest = counted & (part["probs"].argmax(1) == 0)
    assert lesion.any()
    assert part["weak"][:, 0][lesion].min() > part["weak"][:, 0][rest].mean()


def test_probs_sum_to_one_wherever_they_count(make_dataset):
    for step in range(5):
        part = make_dataset()[step]["unlabeled"]
        total = part["probs"].sum(1, keepdim=True)
        assert torch.allclose(total[part["weight"] > 0], torch.ones(()), atol=1e-5)


def test_the_strong_view_differs_from_the_weak_one_and_both_are_empty_in_padding(make_dataset):
    part = make_dataset()[1]["unlabeled"]
    assert not torch.equal(part["weak"], part["strong"])
    outside = part["weight"] == 0
    assert not part["weak"][outside].any()
    assert not part["strong"][outside].any()


def test_foreground_sampling_places_patches_on_foreground(make_dataset):
    def count(foreground):
        dataset = make_dataset(foreground=foreground, patch_size=(4, 4, 4))
        return sum(int((dataset[step]["labeled"]["label"] == 2).sum()) for step in range(12))

    assert count(1.0) > 2 * count(0.0)


class Labeled:
    """A case whose label is half ignored."""

    case_id = "half"
    shape = (8, 8, 8)
    affine = np.eye(4)

    def image(self):
        return np.ones((1, 8, 8, 8), np.float16)

    def label(self):
        label = np.zeros((8, 8, 8), np.uint8)
        label[:4] = IGNORE
        return label

    def class_voxels(self):
        return {}


def test_ignored_voxels_and_padding_have_no_weight():
    sampling = Sampling(0, 0, (12, 12, 12), 1, 0, 0.5, 1.0, (0, 1, 2))
    part = PatchDataset([Labeled()], (), sampling)[0]["labeled"]
    assert not part["weight"][part["label"] == IGNORE].any()
    assert 0 < part["weight"].sum() < 12**3 / 2


class Middle(Labeled):
    """A case with an organ in its middle, whose image is 1 there."""

    shape = (20, 20, 20)

    def image(self):
        return self.label()[None].astype(np.float16)

    def label(self):
        label = np.zeros(self.shape, np.uint8)
        label[8:12, 8:12, 8:12] = 1
        return label


def test_shares_of_classes_are_those_of_unlabeled_patches(monkeypatch):
    monkeypatch.setattr(loaders, "SHARE_PATCHES", 100)
    monkeypatch.setattr(PatchDataset, "_seed", lambda _, step, index, __: step + index)
    sampling = Sampling(0, 1, (8, 8, 8), 1, 100, 1.0, 1.0, (0, 1, 2))
    dataset = PatchDataset([Middle()], [UnlabeledCase(Middle(), None)], sampling)
    part = dataset[0]["unlabeled"]
    share = (part["weak"] * part["weight"]).sum() / part["weight"].sum()
    shares = dataset.measure_shares(2)
    assert shares.sum() == pytest.approx(1)
    assert shares[1] == pytest.approx(share.item(), rel=0.05)
    assert shares[1] > 2 * Middle().label().mean()  # of the scan


def test_ignored_voxels_have_no_share():
    sampling = Sampling(0, 1, (12, 12, 12), 1, 0, 1.0, 1.0, ())
    shares = PatchDataset([Labeled()], (), sampling).measure_shares(2)
    assert shares.tolist() == [1, 0]


def test_a_labeled_case_without_a_label_is_an_error(cached_cases):
    unlabeled = [case for case in cached_cases.values() if case.label_folder is None]
    sampling = Sampling(0, 0, (8, 8, 8), 1, 0, 0.5, 1.0, ())
    with pytest.raises(ValueError, match="without a label"):
        PatchDataset(unlabeled, (), sampling)[0]


def test_without_an_offline_teacher_a_patch_has_views_and_no_targets(cached_cases):
    labeled = [case for case in cached_cases.values() if case.label_folder is not None]
    online = [UnlabeledCase(c, None) for c in cached_cases.values() if c.label_folder is None]
    sampling = Sampling(0, 1, (8, 8, 8), 1, 2, 0.5, 1.0, ())
    part = PatchDataset(labeled, online, sampling)[0]["unlabeled"]
    assert set(part) == {"weak", "strong", "weight"}


def test_what_a_patch_costs_does_not_grow_with_the_number_of_cases(make_dataset, monkeypatch):
    dataset = make_dataset()
    orders, sums = [], []
    draw = np.random.default_rng(0)
    stand_in = SimpleNamespace(permutation=lambda n: orders.append(n) or draw.permutation(n))
    monkeypatch.setattr(loaders.np.random, "default_rng", lambda seed: stand_in)
    loaders._shuffle.cache_clear()
    for step in range(50):
        dataset._choose(1000, "unlabeled", step, 0)
    assert orders == [1000]
    loaders._shuffle.cache_clear()
    stand_in.random, stand_in.choice = draw.random, lambda n, p: sums.append(n) or 0
    weights = [replace(case, weight=1.0 + place) for place, case in enumerate(dataset.unlabeled)]
    PatchDataset(dataset.labeled, weights, dataset.sampling)._choose(3, "unlabeled", 0, 0)
    assert not sums


def test_a_weighted_draw_is_that_of_numpy(make_dataset):
    dataset = make_dataset()
    weights = [replace(case, weight=1.0 + place) for place, case in enumerate(dataset.unlabeled)]
    weighed = PatchDataset(dataset.labeled, weights, dataset.sampling)
    shares = np.array([case.weight for case in weights]) / sum(case.weight for case in weights)
    for step in range(20):
        rng = np.random.default_rng(weighed._seed(step, 0, "choice"))
        drawn = weighed._choose(len(weights), "unlabeled", step, 0)
        assert drawn == rng.choice(len(weights), p=shares)


def test_cases_are_drawn_as_often_as_they_weigh(make_dataset):
    dataset = make_dataset()
    heavy = [
        replace(case, weight=8.0 * (place == 1)) for place, case in enumerate(dataset.unlabeled)
    ]
    weighed = PatchDataset(dataset.labeled, heavy, dataset.sampling)
    assert {weighed._choose(3, "unlabeled", step, 0) for step in range(20)} == {1}
    some = [replace(case, weight=2.0 + 4.0 * (place == 1)) for place, case in enumerate(heavy)]
    weighed = PatchDataset(dataset.labeled, some, dataset.sampling)
    drawn = [weighed._choose(3, "unlabeled", step, 0) for step in range(300)]
    assert np.bincount(drawn) / 300 == pytest.approx([0.2, 0.6, 0.2], abs=0.1)


def test_randaugment_acts_on_strong_views_alone(make_dataset):
    section = RandAugmentSection(num_operations=2, magnitude=27)
    plain, noised = (
        [dataset[step] for step in range(8)]
        for dataset in (make_dataset(strong=0.0), make_dataset(strong=0.0, randaugment=section))
    )
    assert all(torch.equal(b["unlabeled"]["strong"], b["unlabeled"]["weak"]) for b in plain)
    assert not all(torch.equal(b["unlabeled"]["strong"], b["unlabeled"]["weak"]) for b in noised)
    for one, other in zip(plain, noised, strict=True):
        assert torch.equal(one["labeled"]["image"], other["labeled"]["image"])


def test_two_strong_views_of_a_patch_differ_and_lie_on_each_other(make_dataset):
    part = make_dataset(views=("strong", "strong_2"))[0]["unlabeled"]
    assert not torch.equal(part["strong"], part["strong_2"])
    for view in ("strong", "strong_2"):
        pair = torch.stack([part[view].flatten(), part["weak"].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.5
        assert not part[view][part["weight"] == 0].any()


def test_patches_of_the_fine_tune_are_parts_of_the_scan_as_it_is(make_dataset):
    dataset = make_dataset(fine_tune_from=2)
    batch = dataset[2]
    assert batch["unlabeled"] is None
    scans = [np.asarray(case.image()[0], np.float32) for case in dataset.labeled]
    windows = [np.lib.stride_tricks.sliding_window_view(s, (8, 8, 8)) for s in scans]

    def is_part(patch):
        corner = patch[0, 0, 0, 0].item()
        for view in windows:
            for place in np.argwhere(np.isclose(view[..., 0, 0, 0], corner, atol=1e-3)):
                if np.allclose(view[tuple(place)], patch[0], atol=1e-3):
                    return True
        return False

    assert all(is_part(patch) for patch in batch["labeled"]["image"])
    assert not any(is_part(patch) for patch in dataset[1]["labeled"]["image"])
