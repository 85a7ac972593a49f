import numpy as np
import pytest
import torch

from medssl.config import IGNORE
from medssl.data.loaders import PatchDataset, Sampling, UnlabeledCase, iterate_batches


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
