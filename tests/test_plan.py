import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medssl import plan as plan_module
from medssl.config import InputError
from medssl.data.cases import Case, Dataset
from medssl.data.layouts import read_dataset
from medssl.machine import choose_device, choose_threads
from medssl.networks.build import NetworkSpec, build_network
from medssl.plan import (
    Plan,
    _choose_workers,
    count_unlabeled,
    describe_student,
    list_decisions,
    make_plan,
    suggest_patch,
)
from medssl.rounds.student import check_settings, suggest_smaller
from medssl.runs import read_json, write_json
from medssl.settings import load_config
from medssl.sides import find_mirrored

LABELS = {0: "background", 3: "organ", 7: "lesion"}


class Scans:
    """A data set that a test can fill, of headers with or without voxels."""

    def __init__(self, folder):
        self.folder = folder
        self.labeled, self.unlabeled = [], []

    def add(self, shape=(20, 18, 16), spacing=(1.0, 1.0, 1.0), affine=None, labeled=True):
        name = f"case{len(self.labeled) + len(self.unlabeled)}"
        rng = np.random.default_rng(len(name))
        affine = np.diag([*spacing, 1.0]) if affine is None else affine
        label = np.zeros(shape, np.uint8)
        label[tuple(slice(n // 4, max(n // 2, 1)) for n in shape)] = 3
        image = (100.0 * (label == 3) + rng.normal(0, 5, shape)).astype(np.float32)
        paths = self.folder / f"{name}.nii", self.folder / f"{name}_label.nii"
        for path, array in zip(paths, (image, label), strict=True):
            nib.save(nib.Nifti1Image(array, affine), path)
        case = Case(name, paths[:1], paths[1] if labeled else None, name)
        (self.labeled if labeled else self.unlabeled).append(case)
        return self

    def plan(self, *overrides, labels=LABELS, channels=("MRI",), ignore=None):
        config = load_config(overrides=["device=cpu", *overrides]).config
        cases = (*self.labeled, *self.unlabeled)
        dataset = Dataset("tiny", self.folder, "list", cases, labels, channels, ignore)
        return make_plan(config, dataset, labels, self.labeled, self.unlabeled)


@pytest.fixture
def scans(tmp_path):
    return Scans(tmp_path)


def test_a_plan_needs_no_configuration_and_says_why(scans):
    plan = scans.add().add(labeled=False).plan()
    text = "\n".join(plan.reasons)
    for word in ("device", "spacing", "normalization", "patch", "network", "steps", "mirroring"):
        assert word in text, word
    assert min(plan.steps) > 0
    assert plan.device == "cpu"


def test_a_plan_comes_back_from_its_file_as_it_was(scans, tmp_path):
    plan = scans.add().plan()
    write_json(tmp_path / "plan.json", plan.model_dump(mode="json"))
    assert Plan.model_validate(read_json(tmp_path / "plan.json")) == plan


def test_label_values_are_numbered_in_their_order_with_their_names(scans):
    plan = scans.add().plan()
    assert plan.label_values == (0, 3, 7)
    assert plan.labels == {0: "background", 1: "organ", 2: "lesion"}
    assert plan.num_classes == plan.network.num_classes == 3


def test_spacing_is_the_median_of_all_scans(scans):
    for spacing in (1.0, 1.5, 4.0):
        scans.add(spacing=(spacing, 1.0, 2.0), labeled=spacing == 1.0)
    assert scans.plan().preprocessing.spacing == (1.5, 1.0, 2.0)


def test_spacing_is_counted_along_right_anterior_superior_whatever_the_file_says(scans):
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = -3.0, 1.0, 2.0, 1.0
    assert scans.add(affine=affine).plan().preprocessing.spacing == (1.0, 2.0, 3.0)


def add_large_scan(scans, spacing=(1, 1, 1), lesions=False):
    """Add a scan that no patch of a processor holds half of."""
    scans.add((96, 96, 64), spacing)
    label = np.zeros((96, 96, 64), np.uint8)
    label[8:88, 8:88, 8:56] = 3
    if lesions:
        label[::7, ::7, ::7] = 7
    nib.save(nib.Nifti1Image(label, np.diag([*spacing, 1])), scans.labeled[-1].label)
    return scans


@pytest.mark.parametrize(
    ("spacing", "coarser"), [((1, 1, 1), (1.5, 1.5, 1.5)), ((0.5, 0.5, 2), (0.875, 0.875, 2.0))]
)
def test_a_spacing_is_coarser_where_a_patch_would_hold_little_of_a_scan(scans, spacing, coarser):
    plan = add_large_scan(scans, spacing).plan()
    assert plan.preprocessing.spacing == coarser
    (why,) = (reason for reason in plan.reasons if reason.startswith("made coarser"))
    assert f"plan.spacing={[float(step) for step in spacing]}" in why


def test_slices_are_made_coarser_in_their_plane_alone(scans):
    scans.add((320, 256, 8), (1, 1, 8))
    label = np.zeros((320, 256, 8), np.uint8)
    label[50:200, 50:200, 2:6] = 3
    nib.save(nib.Nifti1Image(label, np.diag([1, 1, 8, 1])), scans.labeled[0].label)
    assert scans.plan().preprocessing.spacing == (1.5, 1.5, None)
    assert scans.plan("plan.dimension=2", "plan.spacing=[1,1]").preprocessing.spacing[:2] == (1, 1)


@pytest.mark.parametrize("given", ["plan.spacing=[1,1,1]", "plan.patch_size=[16,16,16]"])
def test_a_given_spacing_or_patch_makes_nothing_coarser(scans, given):
    assert add_large_scan(scans).plan(given).preprocessing.spacing == (1, 1, 1)


def test_a_spacing_is_no_coarser_than_the_smallest_class_allows(scans):
    assert add_large_scan(scans, lesions=True).plan().preprocessing.spacing == (1, 1, 1)


def test_given_values_are_taken_over(scans):
    plan = scans.add().plan(
        "plan.spacing=[2, 2, 2]", "plan.patch_size=[16, 16, 8]", "train.batch=3", "steps=11",
        "train.unlabeled_ratio=2", "train.precision=float32", "plan.flips=[1]", "train.workers=3",
    )  # fmt: skip
    assert plan.preprocessing.spacing == (2, 2, 2)
    assert plan.patch_size == (16, 16, 8)
    assert (plan.batch, plan.num_unlabeled, plan.steps) == (3, 6, 11)
    assert (plan.precision, plan.flips, plan.workers) == ("float32", (1,), 3)


@pytest.mark.parametrize("step", ["1e-3", "1e-300"])
def test_a_spacing_that_no_memory_holds_is_refused(scans, step):
    with pytest.raises(InputError, match=r"plan\.spacing=.*more than fit"):
        scans.add((99, 99, 99)).plan(f"plan.spacing=[{step}, {step}, {step}]")


def test_a_patch_that_the_network_cannot_halve_is_refused_with_the_nearest(scans):
    with pytest.raises(InputError, match=r"plan\.patch_size=\[18, 16, 16\].*nearest is \[20, 16"):
        scans.add().plan("plan.patch_size=[18, 16, 16]")


def test_a_patch_of_which_one_voxel_is_left_is_refused(scans):
    with pytest.raises(InputError, match=r"plan\.patch_size=.* one voxel of a patch is left"):
        scans.add().plan("plan.patch_size=[1, 1, 1]")


def test_a_depth_for_which_the_patch_has_no_room_is_refused(scans):
    assert len(scans.add().plan("network.depth=3").network.strides) == 3
    with pytest.raises(InputError, match=r"network\.depth=6: .* has room for 3 levels"):
        scans.plan("network.depth=6")


shapes = st.tuples(*[st.integers(1, 400)] * 3).filter(lambda shape: max(shape) > 1)
spacings = st.tuples(*[st.floats(0.3, 8.0)] * 3)


@given(shapes, spacings)
@settings(max_examples=25)
def test_every_shape_and_spacing_gets_a_patch_that_fits_the_network_and_the_budget(shape, spacing):
    from medssl import plan as module

    config = load_config(overrides=["device=cpu"]).config
    found = np.array([shape])
    size, strides = module._choose_patch(config, found, spacing, False, [])
    factor = np.prod(np.array(strides), axis=0)
    assert (np.array(size) % factor == 0).all()
    assert np.prod(size) <= module.CPU_PATCH_VOXELS
    assert (np.array(size) < found[0] + factor).all()
    assert len(strides) >= 3
    assert strides[0] == (1, 1, 1)


@pytest.mark.parametrize("shape", [(20, 18, 16), (30, 25, 1), (12, 12, 5)])
def test_the_network_of_a_plan_takes_its_patch(scans, shape):
    plan = scans.add(shape, (1.0, 1.0, 4.0)).plan("network.width=0.25", "plan.dimension=3")
    network = build_network(plan.network)
    heads = network.forward_heads(torch.zeros(1, 1, *plan.patch_size))
    assert heads[0].shape == (1, 3, *plan.patch_size)
    assert len(heads) == 1 + network.num_heads >= 2


def test_a_coarse_axis_is_not_halved_and_gets_flat_kernels_at_first(scans):
    plan = scans.add((40, 40, 12), (1.0, 1.0, 5.0)).plan("plan.dimension=3")
    assert plan.network.strides[1] == (2, 2, 1)
    assert plan.network.kernels[0] == (3, 3, 1)
    assert plan.network.kernels[-1] == (3, 3, 3)


def test_ct_is_normalized_by_its_labeled_foreground_and_mri_by_each_scan(scans):
    scans.add()
    (ct,) = scans.plan(channels=("CT",)).preprocessing.normalization
    assert ct.kind == "ct"
    assert ct.mean == pytest.approx(100, abs=3)
    assert 80 < ct.low < ct.mean < ct.high < 120
    (mri,) = scans.plan(channels=("MRI",)).preprocessing.normalization
    assert mri.kind == "zscore"
    (forced,) = scans.plan(
        "plan.normalization=zscore", channels=("CT",)
    ).preprocessing.normalization
    assert forced.kind == "zscore"


def test_ct_is_normalized_by_some_voxels_of_each_of_many_labeled_scans(scans, monkeypatch):
    monkeypatch.setattr(plan_module, "MOST_FOREGROUND", 60)
    for _ in range(3):
        scans.add()
    taken, measure = [], np.percentile
    monkeypatch.setattr(
        plan_module.np, "percentile", lambda v, q: taken.append(np.size(v)) or measure(v, q)
    )
    (ct,) = scans.plan(channels=("CT",)).preprocessing.normalization
    assert taken == [60]
    assert 80 < ct.low < ct.mean < ct.high < 120


def test_ct_without_any_labeled_foreground_is_an_error_with_the_way_out(scans):
    with pytest.raises(InputError, match=r"plan\.normalization=zscore"):
        scans.add(labeled=False).plan(channels=("CT",))


@pytest.mark.parametrize(
    ("air", "bone", "step", "channel", "says"),
    [
        (-1024, 3071, 1, "", True),
        (-1000, 900, 1, "direct", True),
        (-3024, 1500, 1, "image", True),
        (0, 3071, 1, "", False),
        (-1024, 3071, 1.3, "", False),  # no whole numbers
        (-900, 100, 1, "", False),
    ],
)
def test_what_looks_like_ct_is_said_and_not_decided(scans, air, bone, step, channel, says):
    (case,) = scans.add().labeled
    values = np.linspace(air, bone, 20 * 18 * 16).reshape(20, 18, 16)
    image = (np.rint(values) * step).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), case.images[0])
    plan = scans.plan(channels=(channel,))
    text = "\n".join(plan.reasons)
    assert ("looks like CT" in text) is says
    assert plan.preprocessing.normalization[0].kind == "zscore"
    given = scans.plan("plan.normalization=zscore", channels=(channel,))
    assert "looks like CT" not in "\n".join(given.reasons)


@pytest.mark.parametrize(
    ("channel", "air", "kind"),
    [("CT venous", -1000, "ct"), ("abdomen_CT", -1000, "ct"), ("PET/CT", 0, "zscore")],
)
def test_a_channel_that_is_named_ct_and_looks_like_it_is_ct(scans, channel, air, kind):
    (case,) = scans.add().labeled
    values = np.rint(np.linspace(air, 900, 20 * 18 * 16)).reshape(20, 18, 16)
    nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4)), case.images[0])
    plan = scans.plan(channels=(channel,))
    assert plan.preprocessing.normalization[0].kind == kind
    assert scans.plan("plan.normalization=zscore").preprocessing.normalization[0].kind == "zscore"


def test_a_patch_that_is_alone_is_mixed_with_none_and_the_plan_says_so(scans):
    text = "labeled patches are not mixed"
    scans.add()
    assert text in "\n".join(scans.plan("train.batch=1").reasons)
    assert text not in "\n".join(scans.plan("train.batch=2").reasons)
    off = scans.plan("train.batch=1", "noise.labeled_mixing=none")
    assert text not in "\n".join(off.reasons)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.schedule=pretrain", "train.fine_tune.share=0.004"], "labels are seen in the fine"),
        (["train.schedule=pretrain", "train.fine_tune.share=0.5", "noise.mixing=copy_paste",
          "train.batch=1"], "a step has one"),
        (["noise.mixing=cutmix", "train.batch=1"], "a step has one"),
    ],
)  # fmt: skip
def test_students_that_see_no_label_or_mix_with_themselves_are_refused(scans, overrides, words):
    given = ["method=classic", "steps=100", *overrides]
    plan = scans.add().add(labeled=False).plan(*given)
    with pytest.raises(InputError, match=words):
        check_settings(load_config(overrides=given).config, plan, 0)


@pytest.mark.parametrize(
    ("overrides", "offered"),
    [
        ([], ["plan.patch_size"]),
        (["train.batch=4"], ["plan.patch_size", "train.batch=2"]),
        (["train.unlabeled_ratio=0.5", "train.batch=4"], ["plan.patch_size", "train.batch=3"]),
        (["train.unlabeled_ratio=[1, 4]"], ["plan.patch_size", "train.unlabeled_ratio=1"]),
        (["noise.mixing=none"], ["plan.patch_size", "train.batch=1"]),
        (["plan.dimension=2"], ["plan.patch_size", "train.batch=4"]),
        (["network.depth=4", "plan.patch_size=[32,8,8]"], ["network.width=0.5"]),
        (["network.depth=4", "plan.patch_size=[32,8,8]", "network.width=0.5"], []),
    ],
)
def test_each_setting_that_is_offered_for_less_memory_is_accepted(scans, overrides, offered):
    add_large_scan(scans).add(labeled=False)
    config = load_config(overrides=overrides).config
    plan = scans.plan(*overrides)
    advice = suggest_smaller(config, plan, 1)
    ways = [way.split() for way in advice.removeprefix("set ").split(", or ") if offered]
    assert advice.startswith("set " if offered else "use a machine with more memory")
    assert [way[0].split("=")[0] for way in ways] == [word.split("=")[0] for word in offered]
    assert all(word in advice for word in offered)
    for way in ways:
        smaller = scans.plan(*overrides, *way)
        check_settings(load_config(overrides=[*overrides, *way]).config, smaller, 0)
        assert smaller.preprocessing.spacing == plan.preprocessing.spacing
        if "plan.patch_size" in way[0]:
            assert np.prod(smaller.patch_size) <= np.prod(plan.patch_size) / 2


def test_a_smaller_patch_of_a_network_with_an_encoder_is_one_that_it_takes(tiny_plan):
    update = {"patch_size": (256, 256), "slice_axis": 2, "network": NetworkSpec(
        name="unet", in_channels=1, num_classes=3, encoder="resnet18"
    )}  # fmt: skip
    plan, config = tiny_plan.model_copy(update=update), load_config().config
    assert suggest_patch(plan, config, 0.5) == (160, 192)
    assert suggest_patch(plan.model_copy(update={"patch_size": (64, 64)}), config, 0.5) is None


@pytest.mark.parametrize("name", ["none", "free", "soft", "quantile"])
def test_cases_are_not_drawn_by_a_coverage_that_all_have(tiny_plan, name):
    def check(*more):
        settings = ["method=noisy_student", f"filter.threshold.name={name}", *more]
        check_settings(load_config(overrides=settings).config, tiny_plan, 0)

    with pytest.raises(InputError, match=r"filter\.case\.draw=uniform"):
        check()
    with pytest.raises(InputError, match=r"filter\.case\.draw=uniform"):
        check("filter.uncertainty={source: mc_dropout, start: null}")
    check("filter.uncertainty={source: mc_dropout, start: 0.5}")
    check("filter.threshold={name: fixed, start: 0.8}")


def test_a_fine_tune_of_one_step_is_one(scans):
    given = ["method=classic", "steps=100", "train.schedule=pretrain"]
    plan = scans.add().add(labeled=False).plan(*given, "train.fine_tune.share=0.01")
    config = load_config(overrides=[*given, "train.fine_tune.share=0.01"]).config
    check_settings(config, plan, 0)


@pytest.fixture
def cores(monkeypatch):
    """Eight cores of which a test says how many are free; torch would take all."""

    def use(free, count=8):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr("medssl.machine.TORCH_THREADS", 8)
        monkeypatch.setattr("medssl.machine.count_cores", lambda: count)
        monkeypatch.setattr("medssl.machine.count_free_cores", lambda: free)

    return use


@pytest.mark.parametrize(
    ("free", "count", "threads"), [(8.0, 8, 8), (5.2, 8, 5), (0.1, 8, 1), (7.0, 2, 2)]
)
def test_threads_are_as_many_as_cores_are_free(scans, cores, free, count, threads):
    cores(free, count)
    plan = scans.add().plan()
    assert plan.threads == choose_threads() == threads
    says = "what other programs leave free" in "\n".join(plan.reasons)
    assert says is (threads < 8)


def test_a_run_goes_on_with_its_threads_where_there_are_as_many_cores(cores):
    cores(1.0)
    assert choose_threads(recorded=4) == 4
    cores(1.0, count=2)
    assert choose_threads(recorded=4) == 2


def test_the_user_s_number_of_threads_stands(cores, monkeypatch):
    cores(1.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert choose_threads() == choose_threads(recorded=2) == 8


def test_loaders_of_a_gpu_take_the_cores_of_this_process_but_one(cores):
    config = load_config().config
    for count, workers in ((1, 1), (2, 1), (5, 4), (64, 8)):
        cores(0.0, count)
        assert _choose_workers(config, on_gpu=True) == workers


@pytest.mark.parametrize(
    ("name", "sided"),
    [
        ("kidney_left", True), ("Right Kidney", True), ("LeftKidney", True), ("kidneyRight", True),
        ("leftkidney", True), ("Lung-R", True), ("niere links", True), ("liver", False),
        ("linke Niere", True), ("rechte_niere", True), ("riñón izquierdo", True),
        ("rene destro", True), ("rein droit", True), ("lateral ventricle", False),
        ("anterior", False), ("LV", False), ("tumor", False),
    ],
)  # fmt: skip
def test_only_left_right_is_mirrored_and_not_where_a_label_has_a_side(scans, name, sided):
    plan = scans.add().plan(labels={0: "background", 3: name})
    assert plan.flips == (() if sided else (0,))


def test_labels_without_names_that_lie_as_left_and_right_do_are_not_mirrored(scans):
    (case,) = scans.add((40, 30, 20)).labeled
    unnamed = {0: "background", 3: "class_3", 7: "class_7"}

    def say(second, labels):
        label = np.zeros((40, 30, 20), np.uint8)
        label[3:9, 10:20, 5:17], label[second] = 3, 7
        nib.save(nib.Nifti1Image(label, np.eye(4)), case.label)
        plan = scans.plan(labels=labels)
        return plan.flips, "\n".join(plan.reasons)

    beside, before = np.s_[31:37, 11:21, 5:17], np.s_[3:9, 21:28, 5:17]
    for labels in (unnamed, {0: "background", 3: "munuainen A", 7: "munuainen B"}):
        flips, text = say(beside, labels)
        assert flips == ()
        assert f"{labels[3]} and {labels[7]} are as large as each other" in text
    hint = "unnamed labels are left and right: plan.flips=[]"
    flips, text = say(before, unnamed)
    assert flips == (0,)
    assert hint in text
    flips, text = say(before, {0: "background", 3: "a", 7: "b"})
    assert flips == (0,)
    assert hint not in text


def test_unnamed_labels_that_are_never_together_leave_doubt_and_are_not_mirrored(scans):
    plan = scans.add().plan(labels={0: "background", 3: "class_3", 7: "class_7"})
    assert plan.flips == ()
    assert "no label holds them together" in "\n".join(plan.reasons)


def test_sides_of_pictures_are_those_of_their_columns(scans, tmp_path):
    label = np.zeros((40, 60), np.uint8)
    label[10:30, 5:15], label[11:31, 44:55] = 3, 7
    rng = np.random.default_rng(0)
    image = (label * 20 + rng.integers(0, 50, label.shape)).astype(np.uint8)
    for name, array in (("chest", image), ("chest_label", label)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    paths = tmp_path / "chest.png", tmp_path / "chest_label.png"
    scans.labeled.append(Case("chest", paths[:1], paths[1], "chest"))
    for names, flips in ((("class_3", "class_7"), ()), (("LK", "RK"), ()), (("organ",), (1,))):
        labels = {0: "background", **dict(zip((3, 7), names, strict=False))}
        if len(names) == 1:
            Image.fromarray(np.where(label == 3, label, 0).astype(np.uint8)).save(paths[1])
        assert scans.plan(labels=labels).flips == flips


@pytest.mark.real
@pytest.mark.parametrize("name", ["Task04_Hippocampus", "acdc_half", "spine_vb"])
def test_sets_without_sides_are_mirrored_whichever_cases_are_labeled(name):
    dataset = read_dataset(Path(os.environ["MEDSSL_DATA"]) / name)
    cases = [case for case in dataset.cases if case.label is not None]
    values = {"Task04_Hippocampus": 2, "acdc_half": 3, "spine_vb": 5}[name]
    for first in range(0, 36, 9):
        found = find_mirrored(cases[first : first + 3], tuple(range(values + 1)), None, 0)
        assert found == (None, True)


def test_an_unknown_device_is_refused_and_names_the_doctor():
    for name in ("abacus", "meta", "cpu:x"):
        with pytest.raises(InputError, match="medssl doctor"):
            choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_refused_where_it_was_asked_for_and_not_on_auto():
    with pytest.raises(InputError, match="device cuda: not available"):
        choose_device("cuda")
    assert choose_device("auto") == "cpu"


def test_bfloat16_is_chosen_where_the_processor_has_it_and_is_faster_in_it(scans, monkeypatch):
    scans.add()
    factors = iter([3.2, 1.1, 1.05])
    monkeypatch.setattr("medssl.machine.measure_bfloat16", lambda: next(factors))
    monkeypatch.setattr("medssl.machine.has_cpu_bfloat16", lambda: True)
    plans = [scans.plan() for _ in range(3)]
    assert [plan.precision for plan in plans] == ["bfloat16", "bfloat16", "float32"]
    assert "3.2 times as fast" in " ".join(plans[0].reasons)
    monkeypatch.setattr("medssl.machine.has_cpu_bfloat16", lambda: False)
    assert scans.plan().precision == "float32"


def test_the_estimate_of_the_disk_grows_with_unlabeled_scans(scans):
    one = (
        scans.add((100, 100, 100)).add((100, 100, 100), labeled=False).plan("plan.spacing=[1,1,1]")
    )
    # by hand, in MB: two images float16 and labels uint8; twice 3 classes uint8, entropy float16
    assert one.estimate["disk_mb"] == pytest.approx(2 * 3 + 2 * 5 + 30, abs=0.1)
    assert (
        scans.add((100, 100, 100), labeled=False).plan("plan.spacing=[1,1,1]").estimate["disk_mb"]
        > 40
    )


@pytest.mark.parametrize(("dimension", "first"), [(2, 8000), (3, 2400)])
def test_a_student_from_scratch_has_the_steps_of_round_0(scans, dimension, first):
    scans.add().add(labeled=False)
    in_it = f"plan.dimension={dimension}"
    assert scans.plan("train.start=warm", in_it).steps == (first, 1600)
    assert scans.plan("train.start=scratch", in_it).steps == first
    assert scans.plan("train.start=scratch", "steps=[50, 20]").steps == (50, 20)


def test_a_student_has_the_noise_and_the_patches_of_its_round(scans):
    scans.add().add(labeled=False)
    settings = ["noise.dropout=0.5", "train.unlabeled_ratio=[7, 14]", "train.batch=2"]
    config = load_config(overrides=settings).config
    plan = scans.plan(*settings)
    assert [count_unlabeled(config, plan.batch, index) for index in (1, 2, 3)] == [14, 28, 28]
    assert plan.network.dropout == 0.1
    assert describe_student(plan, config, 1).dropout == 0.5


def test_windows_of_pseudo_labels_are_those_of_the_unlabeled_scans(scans):
    scans.add((40, 40, 40)).add((40, 40, 40), labeled=False).add((60, 40, 40), labeled=False)
    plan = scans.plan("plan.patch_size=[40,40,40]", "network.depth=3")
    assert plan.estimate["windows"] == 1 + 2  # of 60 voxels: at 0 and at 20


def test_channels_of_several_kinds_stay_to_be_decided_by_their_names(scans):
    ct, other = scans.add().plan(channels=("CT",)), scans.plan()
    assert list_decisions(ct)["plan.normalization"] == "ct"
    both = tuple(plan.preprocessing.normalization[0] for plan in (ct, other))
    recipe = ct.preprocessing.model_copy(update={"normalization": both})
    plan = ct.model_copy(update={"preprocessing": recipe})
    assert list_decisions(plan)["plan.normalization"] == "auto"


def test_what_the_plan_decided_resolves_every_auto_of_the_configuration(scans):
    plan = scans.add().plan()
    resolved = load_config(plan=list_decisions(plan))
    assert resolved.config.train.steps == plan.steps
    assert resolved.config.plan.patch_size == plan.patch_size
    assert resolved.config.network.depth == len(plan.network.strides)
    assert resolved.sources["train.steps"] == "plan"
    again = scans.plan("plan.patch_size=" + str(list(resolved.config.plan.patch_size)))
    assert again.network == plan.network
