import errno
import gzip
import itertools
import pickle
import threading
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from medssl import costs, predict, runs, windows
from medssl.cli import app
from medssl.config import InputError, UncertaintySection
from medssl.data import predictions
from medssl.data.io import read_image
from medssl.data.predictions import SomeFailedError, find_scans, plan_predictions
from medssl.data.trained import count_model_channels
from medssl.losses.entropy import renyi_entropy
from medssl.networks.build import build_network
from medssl.networks.noise import sample_dropout
from medssl.predict import (
    FAST_VIEWS,
    SAMPLERS,
    Model,
    describe_model,
    estimate_uncertainty,
    find_finished,
    load_model,
    predict_case,
    predict_files,
    predict_probs,
    resolve_model,
    sample_probs,
    save_model,
)
from medssl.pseudo import uncertainty
from medssl.pseudo.uncertainty import combine, entropy_of, find_limit
from medssl.runs import read_json, write_json
from medssl.transforms.spatial import draw_turn, turn_volume
from medssl.windows import Window, slide_window

ISOTROPIC = np.diag([1.0, 1, 1, 1])
ANISOTROPIC = np.diag([0.8, 0.8, 2.5, 1])
FLIPPED = np.array([[-1.0, 0, 0, 40], [0, 0, 1.2, -7], [0, -1, 0, 3], [0, 0, 0, 1]])


def turn(degrees):
    angle = np.deg2rad(degrees)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return affine


OBLIQUE = turn(25) @ np.diag([-1.1, 0.9, 1.5, 1])
AFFINES = {
    "isotropic": ISOTROPIC,
    "anisotropic": ANISOTROPIC,
    "flipped": FLIPPED,
    "oblique": OBLIQUE,
}


class Oracle(nn.Module):
    """Says class 1 where the scan is brighter than the middle of the normalized range."""

    def forward(self, image):
        return torch.cat([-image, image], dim=1)


@pytest.fixture
def info(tiny_plan):
    return describe_model(
        tiny_plan.model_copy(update={"patch_size": (16, 16, 16)}),
        {"round": 1},
        intensity_range=((0.0, 100.0),),
        spacing_range=((0.8, 1.2), (0.8, 1.2), (0.8, 2.5)),
    )


@pytest.fixture
def network(tiny_spec):
    torch.manual_seed(0)
    return build_network(tiny_spec.model_copy(update={"stochastic_depth": 0.9})).eval()


@pytest.fixture
def oracle(info):
    changes = {
        "network": info.network.model_copy(update={"num_classes": 2}),
        "labels": {0: "background", 1: "organ"},
        "label_values": (0, 7),
        "preprocessing": info.preprocessing.model_copy(update={"spacing": (0.8, 0.8, 0.8)}),
    }
    return Model(Oracle(), info.model_copy(update=changes), torch.device("cpu"))


@pytest.fixture
def saved(tmp_path, network, info):
    spec = info.network.model_copy(update={"stochastic_depth": 0.9})
    save_model(tmp_path / "run" / "model", network, info.model_copy(update={"network": spec}))
    return tmp_path / "run"


def write_scan(path, affine=ISOTROPIC, shape=(18, 14, 12), bright=100.0):
    """Write a dark scan with a bright box; return where the box is."""
    box = np.zeros(shape, bool)
    box[4:13, 3:10, 2:9] = True
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.where(box, bright, 0.0).astype(np.float32), affine)
    image.header["descrip"] = b"Doe^John"
    nib.save(image, path)
    return box


def dice(first, second):
    return 2 * (first & second).sum() / (first.sum() + second.sum())


def test_a_network_comes_back_from_its_folder_as_it_was(saved, network):
    model = load_model(saved)
    image = torch.randn(1, 1, 8, 8, 8)
    assert torch.equal(model.network(image), network(image))
    for key, value in network.state_dict().items():
        assert torch.equal(value, model.network.state_dict()[key]), key
    assert model.info.label_values == (0, 1, 5)
    assert model.info.labels == {0: "background", 1: "organ", 2: "lesion"}
    assert not model.network.training


def test_every_weight_is_stored_once(saved, network):
    stored = load_file(saved / "model" / "weights.safetensors")
    count = sum(parameter.numel() for parameter in network.parameters())
    assert sum(value.numel() for value in stored.values()) == count


@pytest.mark.parametrize("inside", [".", "model"])
def test_a_model_is_found_in_a_run_and_in_its_own_folder(saved, inside):
    assert resolve_model(saved / inside).resolve() == (saved / "model").resolve()


def test_a_run_without_a_delivered_model_names_its_finished_rounds(tmp_path, network, info):
    save_model(tmp_path / "run" / "round_0" / "model", network, info)
    with pytest.raises(InputError, match=r"finished rounds: round_0 \(use .*round_0\)"):
        resolve_model(tmp_path / "run")
    with pytest.raises(InputError, match="no such run"):
        resolve_model(tmp_path / "nothing")


def forget_hash(folder):
    """Let a model folder be as one whose weights nobody has hashed."""
    path = folder / "model" / "model.json"
    content = read_json(path)
    del content["provenance"]["weights.safetensors"]
    write_json(path, content)


def test_weights_of_another_model_are_refused(saved):
    path = saved / "model" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="not the weights that this model was saved with"):
        load_model(saved)


def test_a_pickle_in_place_of_weights_is_refused_without_executing(saved, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    forget_hash(saved)
    (saved / "model" / "weights.safetensors").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(InputError, match="weights cannot be read"):
        load_model(saved)
    assert not (tmp_path / "executed").exists()


def damage_weights(folder, change):
    forget_hash(folder)
    path = folder / "model" / "weights.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop(next(iter(weights))),
        lambda weights: weights.update(unknown=torch.zeros(1)),
        lambda weights: weights.update({next(iter(weights)): torch.zeros(1)}),
    ],
    ids=["missing", "unknown", "other shape"],
)
def test_weights_that_do_not_fit_are_refused(saved, change):
    damage_weights(saved, change)
    with pytest.raises(InputError, match="weights"):
        load_model(saved)


def test_cut_off_weights_are_refused(saved):
    forget_hash(saved)
    path = saved / "model" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="weights cannot be read"):
        load_model(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"extra": 1},
        {"labels": {"0": "background"}},
        {"channels": ["CT", "MRI"]},
        {"network": {"name": "other"}},
        {"flips": [9]},
        {"flips": [0, 0]},
        {"flips": [-1]},
        {"precision": "banana"},
        {"patch_size": [0, -1, 16]},
        {"patch_size": [16, 16]},
        {"patch_size": [15, 16, 16]},
        {"patch_size": [1000000, 16, 16]},
        {"label_values": [0, 1, 1]},
        {"label_values": [0, 1, 2**31]},
        {"network": {"strides": [[1, 1, 1], [0, 2, 2], [2, 2, 2]]}},
        {"network": {"strides": [[-1, 1, 1], [2, 2, 2], [2, 2, 2]]}},
        {"network": {"kernels": [[3, 3, 3], [3, 3, 3], [3, 3, 0]]}},
        {"network": {"dropout": "nan"}},
        {"network": {"stochastic_depth": 1e9}},
        {"preprocessing": {"spacing": [1e9, 1, 1]}},
        {"labels": {"0": "a", "1": "b", "7": "c"}},
        {"intensity_range": [[5.0, 1.0]]},
    ],
    ids=str,
)
def test_a_description_of_another_kind_is_refused(saved, change):
    path = saved / "model" / "model.json"
    content = read_json(path)
    for section in ("network", "preprocessing"):
        content[section] |= change.pop(section, {})
    write_json(path, content | change)
    with pytest.raises(InputError, match=r"model\.json: not as this version"):
        load_model(saved)


def test_a_bfloat16_model_runs_in_float32_where_bfloat16_is_emulated(saved, monkeypatch):
    path = saved / "model" / "model.json"
    write_json(path, read_json(path) | {"precision": "bfloat16"})
    monkeypatch.setattr("medssl.machine.has_cpu_bfloat16", lambda: True)
    assert load_model(saved).info.precision == "bfloat16"
    monkeypatch.setattr("medssl.machine.has_cpu_bfloat16", lambda: False)
    assert load_model(saved).info.precision == "float32"


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"null", b'{"network": {'])
@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
def test_any_damaged_file_of_a_model_folder_is_an_error_of_the_input(saved, name, content):
    (saved / "model" / name).write_bytes(content)
    with pytest.raises(InputError, match=str(saved)):
        load_model(saved)
    if name == "model.json":
        with pytest.raises(InputError, match=r"model\.json"):
            count_model_channels(saved)


@pytest.mark.parametrize("name", AFFINES)
def test_a_mask_has_the_grid_and_the_label_values_of_its_scan(oracle, tmp_path, name):
    box = write_scan(tmp_path / "scans" / "a.nii.gz", AFFINES[name])
    predict_files(oracle, [tmp_path / "scans"], tmp_path / "out", report=lambda text: None)
    mask = nib.load(tmp_path / "out" / "a.nii.gz")
    found = np.asanyarray(mask.dataobj)
    assert found.shape == box.shape
    assert np.allclose(mask.affine, AFFINES[name], atol=1e-5)
    assert found.dtype == np.uint8
    assert set(np.unique(found)) == {0, 7}
    assert dice(found == 7, box) >= 0.99
    assert b"Doe" not in mask.header.binaryblock


def test_masks_and_maps_say_of_their_place_what_their_scan_says(oracle, tmp_path):
    scan = tmp_path / "scans" / "a.nii.gz"
    write_scan(scan, ANISOTROPIC)
    image = nib.load(scan)
    image.set_qform(FLIPPED, 3, update_affine=False)
    image.set_sform(ANISOTROPIC / 1000, 4, update_affine=False)
    image.header.set_xyzt_units("meter")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), scan)
    told = []
    predict_files(oracle, [scan], tmp_path / "out", probs=True, report=told.append)
    assert "the sform, which is used here, is not the one in pixdim" in told[0]
    assert "another unit, converted to mm: meter" in told[0]
    expected = nib.load(scan).header
    for name in ("a", "a_probs"):
        found = nib.load(tmp_path / "out" / f"{name}.nii.gz").header
        for field in ("qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "xyzt_units"):
            np.testing.assert_array_equal(found[field], expected[field])
        np.testing.assert_array_equal(found["pixdim"][:4], expected["pixdim"][:4])
    mask = np.asanyarray(nib.load(tmp_path / "out" / "a.nii.gz").dataobj)
    assert dice(mask == 7, np.asarray(image.dataobj) > 50) >= 0.99, "meters are taken as meters"


def test_the_header_of_a_later_channel_is_named_as_that_of_the_first(oracle, tmp_path):
    paths = [tmp_path / f"a_000{channel}.nii.gz" for channel in range(2)]
    for path in paths:
        write_scan(path, ANISOTROPIC)
    image = nib.load(paths[1])
    image.set_qform(FLIPPED, 3, update_affine=False)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), paths[1])
    flags = predict.find_flags(oracle.info, read_image(paths, 2))
    named = [flag for flag in flags if "not the one in pixdim" in flag]
    assert len(named) == 1
    assert ": channel 1: 0.8 x 0.8 x 2.5 mm against 1 x 1 x 1.2 mm" in named[0]


@pytest.mark.parametrize(
    ("trained", "values", "is_off"),
    [
        ((-1000, 900), (24, 1924), True),
        ((0, 3000), (-1000, 900), True),
        ((-1000, 900), (-1000, 1500), False),
        ((-1000, 900), (-90, 250), False),
        ((0, 3000), (0, 1200), False),
    ],
)
def test_a_ct_with_another_zero_than_those_of_the_training_is_flagged(
    oracle, tmp_path, trained, values, is_off
):
    image = np.repeat(np.linspace(*values, 50, dtype=np.float32), 20).reshape(10, 10, 10)
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "a.nii")
    info = oracle.info.model_copy(update={"intensity_range": (trained,)})
    flags = predict.find_flags(info, read_image([tmp_path / "a.nii"], 1))
    assert any("Hounsfield" in flag for flag in flags) == is_off


@pytest.mark.parametrize("shape", [(5, 4, 3), (20, 6, 1), (9, 9, 30)])
def test_scans_smaller_and_thinner_than_the_patch_are_segmented(oracle, tmp_path, shape):
    write_scan(tmp_path / "a.nii", shape=shape)
    found = predict_case(oracle, (tmp_path / "a.nii",), probs_in=tmp_path)
    assert found.mask.shape == shape
    assert found.probs.shape == (2, *shape)
    assert np.allclose(found.probs.sum(0), 1, atol=1e-5)


def test_the_whole_way_from_a_saved_network_to_masks_and_maps(saved, tmp_path):
    write_scan(tmp_path / "a.nii.gz", ANISOTROPIC)
    told = []
    out = tmp_path / "out"
    scans = [tmp_path / "a.nii.gz"]
    predict_files(load_model(saved), scans, out, probs=True, uncertainty=True, report=told.append)
    names = [
        "a.nii.gz",
        "a_probs.nii.gz",
        "a_uncertainty.nii.gz",
        "predictions.json",
        "predictions.jsonl",
    ]
    assert sorted(path.name for path in out.iterdir()) == names
    probs = nib.load(out / "a_probs.nii.gz").get_fdata()
    mask = np.asanyarray(nib.load(out / "a.nii.gz").dataobj)
    uncertainty = nib.load(out / "a_uncertainty.nii.gz").get_fdata()
    assert np.array_equal(np.array([0, 1, 5])[probs.argmax(-1)], mask)
    assert 0 <= uncertainty.min() < uncertainty.max() <= np.log(3) + 1e-6
    content = read_json(out / "predictions.json")
    assert content["labels"] == {"0": "background", "1": "organ", "5": "lesion"}
    assert content["model"]["round"] == 1
    assert told[0].startswith(str(out / "a.nii.gz"))


def test_the_same_scan_gets_the_same_uncertainty(saved, tmp_path):
    write_scan(tmp_path / "a.nii")
    model = load_model(saved)
    maps = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        maps.append(predict_case(model, (tmp_path / "a.nii",), passes=3).uncertainty)
    assert np.array_equal(*maps)


class Broken(Oracle):
    def forward(self, image):
        return super().forward(image) * float("nan")


def test_non_finite_logits_write_no_mask_and_the_other_scans_are_segmented(oracle, tmp_path):
    write_scan(tmp_path / "a.nii")
    broken = Model(Broken(), oracle.info, oracle.device)
    with pytest.raises(InputError, match=r"1 of 1 scans were not segmented:\n.*not finite"):
        predict_files(broken, [tmp_path / "a.nii"], tmp_path / "out", probs=True)
    assert not (tmp_path / "out").exists()


def test_all_scans_that_fail_are_named_after_the_others_were_written(oracle, tmp_path):
    write_scan(tmp_path / "scans" / "good.nii")
    (tmp_path / "scans" / "bad.nii").write_bytes(b"no scan")
    holes = np.full((6, 6, 6), np.nan, np.float32)
    nib.save(nib.Nifti1Image(holes, np.eye(4)), tmp_path / "scans" / "holes.nii")
    header = nib.Nifti1Header()
    header.set_data_shape((30_000, 30_000, 30_000))
    with gzip.open(tmp_path / "scans" / "huge.nii.gz", "wb") as file:
        file.write(header.binaryblock + bytes(400))
    with pytest.raises(InputError, match="3 of 4 scans") as caught:
        predict_files(oracle, [tmp_path / "scans"], tmp_path / "out", report=lambda text: None)
    assert "bad.nii" in str(caught.value)
    assert "holes.nii" in str(caught.value)
    assert "huge.nii.gz: cannot be read (the header declares" in str(caught.value)
    assert (tmp_path / "out" / "good.nii.gz").exists()
    assert not (tmp_path / "out" / "holes.nii.gz").exists()


def test_a_scan_that_the_network_has_no_memory_for_is_named_and_the_others_are_segmented(
    oracle, tmp_path, monkeypatch
):
    for name, side in (("large", 40), ("small", 12)):
        write_scan(tmp_path / "scans" / f"{name}.nii", shape=(side, 14, 12))

    def refuse_large(network, image, *rest):
        if image.shape[2] > 20:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")
        return slide_window(network, image, *rest)

    monkeypatch.setattr(predict, "slide_window", refuse_large)
    with pytest.raises(InputError, match=r"1 of 2 scans .*\n.*large\.nii: .*does not fit"):
        predict_files(oracle, [tmp_path / "scans"], tmp_path / "out", report=lambda text: None)
    assert (tmp_path / "out" / "small.nii.gz").exists()


def test_whatever_goes_wrong_with_a_scan_the_others_get_their_masks(oracle, tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        write_scan(tmp_path / "scans" / f"{name}.nii")
    real = predict.predict_case

    def fail(model, images, **options):
        if images[0].name == "b.nii":
            raise ZeroDivisionError("nobody foresaw this")
        return real(model, images, **options)

    monkeypatch.setattr(predict, "predict_case", fail)
    told = []
    with pytest.raises(SomeFailedError, match=r"1 of 3 .*\n.*b\.nii: ZeroDivisionError: nobody"):
        predict_files(oracle, [tmp_path / "scans"], tmp_path / "out", report=told.append)
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == {"a.nii.gz", "c.nii.gz"}
    assert any("b.nii: no mask" in line for line in told)
    assert set(read_json(tmp_path / "out" / "predictions.json")["flags"]) == {"a", "c"}


def test_a_spacing_that_makes_a_huge_grid_is_refused_before_memory_is_taken(oracle, tmp_path):
    write_scan(tmp_path / "a.nii", np.diag([1e3, 1e3, 1e3, 1]))
    with pytest.raises(InputError, match=r"voxels of 1000 x .* more than can be computed here"):
        predict_case(oracle, (tmp_path / "a.nii",))


def test_one_bad_scan_is_exit_code_1_and_a_summary_by_name(saved, tmp_path):
    write_scan(tmp_path / "scans" / "good.nii")
    (tmp_path / "scans" / "bad.nii").write_bytes(b"no scan")
    command = ["predict", str(saved), str(tmp_path / "scans"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit), result.output
    assert "1 of 2 scans were not segmented" in result.output
    assert "bad.nii: cannot be read" in result.output
    assert (tmp_path / "out" / "good.nii.gz").exists()


def test_nothing_is_computed_where_a_manual_mask_would_be_replaced(oracle, tmp_path, monkeypatch):
    write_scan(tmp_path / "scans" / "a.nii.gz")
    write_scan(tmp_path / "labels" / "a.nii.gz")
    before = (tmp_path / "labels" / "a.nii.gz").read_bytes()
    with monkeypatch.context() as patched:
        patched.delattr(predict, "predict_case")
        with pytest.raises(InputError, match=r"nothing was computed.*a\.nii\.gz"):
            predict_files(oracle, [tmp_path / "scans"], tmp_path / "labels")
    assert (tmp_path / "labels" / "a.nii.gz").read_bytes() == before
    quiet = {"report": lambda text: None}
    predict_files(oracle, [tmp_path / "scans"], tmp_path / "labels", overwrite=True, **quiet)
    predict_files(oracle, [tmp_path / "scans"], tmp_path / "labels", **quiet)
    assert (tmp_path / "labels" / "a.nii.gz").read_bytes() != before


def test_what_was_written_before_an_interruption_is_on_the_record(oracle, tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        write_scan(tmp_path / "scans" / f"{name}.nii")
    real = predict.predict_case

    def stop(model, images, **options):
        if images[0].stem == "c":
            raise KeyboardInterrupt
        return real(model, images, **options)

    monkeypatch.setattr(predict, "predict_case", stop)
    monkeypatch.setattr(predictions, "_FEWER", 1e9)
    with pytest.raises(KeyboardInterrupt):
        predict_files(oracle, [tmp_path / "scans"], tmp_path / "out", report=lambda text: None)
    assert set(read_json(tmp_path / "out" / "predictions.json")["files"]) == {
        "a.nii.gz",
        "b.nii.gz",
    }


def test_scans_that_overlap_are_written_and_reported_as_one_after_the_other(
    saved, tmp_path, monkeypatch
):
    for index, name in enumerate("abd"):
        write_scan(tmp_path / "in" / f"{name}.nii", bright=80.0 + index)
    (tmp_path / "in" / "c.nii").write_bytes(b"no scan")
    told = {}
    for way in (False, True):
        out, told[way] = tmp_path / str(way), []
        monkeypatch.setattr(predict, "has_room", lambda size, way=way: way)
        with pytest.raises(SomeFailedError) as caught:
            predict_files(load_model(saved), [tmp_path / "in"], out, report=told[way].append)
        told[way] = [text.replace(str(out), "") for text in (*told[way], str(caught.value))]
    assert told[False] == told[True]
    for name in ("a.nii.gz", "b.nii.gz", "d.nii.gz", "predictions.json"):
        first, second = ((tmp_path / way / name).read_bytes() for way in ("False", "True"))
        assert first == second
    lines = [(tmp_path / way / "predictions.jsonl").read_text() for way in ("False", "True")]
    assert [line.count('"scan"') for line in lines] == [3, 3]


@pytest.mark.parametrize(("probs", "is_beside"), [(False, True), (True, False)])
def test_a_mask_without_probs_is_written_while_the_next_scan_is_segmented(
    oracle, tmp_path, monkeypatch, probs, is_beside
):
    for name in "ab":
        write_scan(tmp_path / "scans" / f"{name}.nii")
    second, real_predict, real_write = threading.Event(), predict.predict_case, predict.write_mask
    waited = []

    def segment(model, images, **options):
        if images[0].name == "b.nii":
            second.set()
        return real_predict(model, images, **options)

    def write(path, *rest, **options):
        if path.name == "a.nii.gz":
            waited.append(second.wait(30 if is_beside else 0.2))
        return real_write(path, *rest, **options)

    monkeypatch.setattr(predict, "has_room", lambda size: True)
    monkeypatch.setattr(predict, "predict_case", segment)
    monkeypatch.setattr(predict, "write_mask", write)
    quiet = {"report": lambda text: None}
    predict_files(oracle, [tmp_path / "scans"], tmp_path / "out", probs=probs, **quiet)
    assert waited == [is_beside]


def test_who_cannot_be_told_of_a_mask_ends_the_call(oracle, tmp_path):
    for name in "abc":
        write_scan(tmp_path / "scans" / f"{name}.nii")

    def refuse(text):
        raise BrokenPipeError(text)

    with pytest.raises(BrokenPipeError, match=r"a\.nii\.gz"):
        predict_files(oracle, [tmp_path / "scans"], tmp_path / "out", report=refuse)
    assert set(read_json(tmp_path / "out" / "predictions.json")["files"]) == {"a.nii.gz"}


def test_a_second_call_adds_to_what_the_first_one_wrote(oracle, tmp_path):
    for name in ("a", "b"):
        write_scan(tmp_path / f"{name}.nii")
        predict_files(
            oracle, [tmp_path / f"{name}.nii"], tmp_path / "out", report=lambda text: None
        )
    assert set(read_json(tmp_path / "out" / "predictions.json")["flags"]) == {"a", "b"}


def test_what_a_stopped_call_has_finished_is_passed_over(saved, tmp_path, monkeypatch):
    for index, name in enumerate("abc"):
        write_scan(tmp_path / "in" / f"{name}.nii", bright=80.0 + index)
    out, real, predicted = tmp_path / "out", predict.predict_case, []

    def stop(model, images, **options):
        if images[0].name == "c.nii":
            raise KeyboardInterrupt
        return real(model, images, **options)

    def count(model, images, **options):
        predicted.append(images[0].name)
        return real(model, images, **options)

    monkeypatch.setattr(costs, "forecast_costs", lambda *_, **__: costs.Costs(1e9, 1, 0, 0))
    command = ["predict", str(saved), str(tmp_path / "in"), "--out", str(out), "--device", "cpu"]
    monkeypatch.setattr(predict, "predict_case", stop)
    assert CliRunner().invoke(app, command).exit_code == 130
    masks = list(out.glob("*.nii.gz"))
    times = [path.stat().st_mtime_ns for path in masks]
    assert len(masks) == 2
    monkeypatch.setattr(predict, "predict_case", count)
    for words in ("2 of 3 scans", "3 of 3 scans"):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert f"passed over: {words} whose masks this model has written there" in result.output
    assert predicted == ["c.nii"]
    assert times == [path.stat().st_mtime_ns for path in masks]


def test_fast_uncertainty_is_another_map_that_is_not_passed_over_as_the_slow_one(saved, tmp_path):
    write_scan(tmp_path / "in" / "a.nii")
    out, maps = tmp_path / "out", []
    command = ["predict", str(saved), str(tmp_path / "in"), "--out", str(out), "--device", "cpu"]
    for option in ("--uncertainty", "--fast-uncertainty"):
        result = CliRunner().invoke(app, [*command, option])
        assert result.exit_code == 0, result.output
        assert "passed over" not in result.output
        maps.append(nib.load(out / "a_uncertainty.nii.gz").get_fdata())
    assert 0 < abs(maps[0] - maps[1]).mean() < 0.1
    assert "passed over: 1 of 1" in CliRunner().invoke(app, [*command, option]).output


def test_processes_that_share_the_scans_write_the_folder_of_one(saved, tmp_path, monkeypatch):
    for index, name in enumerate("abc"):
        write_scan(tmp_path / "in" / f"{name}.nii", bright=80.0 + index)
    (tmp_path / "in" / "d.nii").write_bytes(b"damaged")
    monkeypatch.setattr(costs, "forecast_costs", lambda *_, **__: costs.Costs(1e9, 1, 0, 0))
    command = ["predict", str(saved), str(tmp_path / "in"), "--device", "cpu", "--out"]
    assert CliRunner().invoke(app, [*command, str(tmp_path / "whole")]).exit_code == 1
    monkeypatch.setenv("WORLD_SIZE", "5")
    for place, expected in enumerate(("a.nii", "b.nii", "c.nii", "d.nii", "no scan is left")):
        monkeypatch.setenv("RANK", str(place))
        result = CliRunner().invoke(app, [*command, str(tmp_path / "out")])
        assert result.exit_code == int(expected == "d.nii"), result.output
        assert expected in result.output + str(result.exception)
    folders = [tmp_path / name for name in ("whole", "out")]
    assert read_json(folders[0] / "predictions.json") == read_json(folders[1] / "predictions.json")
    for name in "abc":
        first, second = ((folder / f"{name}.nii.gz").read_bytes() for folder in folders)
        assert first == second


@pytest.mark.parametrize(
    "change", ["nothing", "mask", "scan", "model", "settings", "maps", "passes", "log", "version"]
)
def test_a_mask_is_finished_if_nothing_has_changed_that_it_was_made_of(
    saved, tmp_path, monkeypatch, change
):
    scan, out = tmp_path / "in" / "a.nii", tmp_path / "out"
    write_scan(scan)
    model = load_model(saved)
    predict_files(model, [scan], out, report=lambda text: None)
    plan = plan_predictions([scan], out, 1, maps=["probs"] if change == "maps" else [])
    (mask,), log = plan.masks.values(), out / "predictions.jsonl"
    if change == "mask":
        mask.write_bytes(mask.read_bytes()[:-1])
    elif change == "scan":
        write_scan(scan, bright=99.0)
    elif change in ("model", "settings"):
        updates = {"model": {"provenance": {"weights.safetensors": "0"}}, "settings": {"flips": ()}}
        model = replace(model, info=model.info.model_copy(update=updates[change]))
    elif change == "log":
        log.write_text(log.read_text()[:-9] + "\n")
    elif change == "version":
        monkeypatch.setattr(predict, "__version__", "0.0.1")
    finished = find_finished(model, plan, out, uncertainty=change == "passes")
    assert finished == (["a"] if change == "nothing" else [])


@pytest.mark.parametrize("change", ["other", "copy", "mended", "gone", "overwrite"])
def test_the_mask_of_another_scan_of_the_same_name_is_not_replaced(oracle, tmp_path, change):
    first, second, out = tmp_path / "p1" / "ct.nii", tmp_path / "p2" / "ct.nii", tmp_path / "out"
    write_scan(first)
    predict_files(oracle, [first], out, report=lambda text: None)
    write_scan(first if change == "mended" else second, bright=60.0 if change == "copy" else 50.0)
    if change == "copy":
        second.write_bytes(first.read_bytes())
    if change == "gone":
        (out / "ct.nii.gz").unlink()
    inputs = [first if change == "mended" else second]
    if change == "other":
        with pytest.raises(InputError, match=r"those of other scans: ct \(.*p2"):
            plan_predictions(inputs, out, 1)
    else:
        assert plan_predictions(inputs, out, 1, overwrite=change == "overwrite").scans


def test_what_a_kill_left_among_the_masks_is_removed(oracle, tmp_path, leave):
    write_scan(tmp_path / "a.nii")
    left, deeper = leave(tmp_path / "out", "a.nii.gz"), leave(tmp_path / "out" / "more", "a.nii.gz")
    predict_files(oracle, [tmp_path / "a.nii"], tmp_path / "out", report=lambda text: None)
    assert not left.exists()
    assert deeper.exists(), "no mask goes there, and the folder may be large"


def test_a_scan_is_never_overwritten_by_its_mask(oracle, tmp_path):
    write_scan(tmp_path / "a.nii.gz")
    before = (tmp_path / "a.nii.gz").read_bytes()
    with pytest.raises(InputError, match="overwrite its own scan"):
        predict_files(oracle, [tmp_path / "a.nii.gz"], tmp_path)
    assert (tmp_path / "a.nii.gz").read_bytes() == before


def test_a_scan_like_the_training_scans_has_no_flag(oracle, tmp_path):
    write_scan(tmp_path / "a.nii")
    assert predict_case(oracle, (tmp_path / "a.nii",)).flags == ()


@pytest.mark.parametrize(
    ("scan", "words"),
    [
        ({"affine": np.diag([1.0, 1, 6, 1])}, "spacing 6 mm is outside"),
        ({"affine": np.diag([6.0, 1, 1, 1])}, "spacing 6 mm is outside"),
        ({"bright": 4000.0}, "intensities 0 to 4000 are far"),
        ({"bright": 0.0}, "intensities 0 to 0 are far"),
    ],
)
def test_a_scan_outside_of_the_training_range_is_flagged(oracle, tmp_path, scan, words):
    write_scan(tmp_path / "a.nii", **scan)
    predict_files(oracle, [tmp_path / "a.nii"], tmp_path / "out", report=lambda text: None)
    (flag,) = read_json(tmp_path / "out" / "predictions.json")["flags"]["a"]
    assert words in flag


def test_flips_at_test_time_average_to_a_symmetric_answer(network):
    image = torch.randn(1, 1, 8, 8, 8)
    probs = predict_probs(network, image, Window((8, 8, 8), flips=(0, 2)))
    mirrored = predict_probs(network, image.flip([2]), Window((8, 8, 8), flips=(0, 2)))
    assert torch.allclose(probs.flip([2]), mirrored, atol=1e-5)
    plain = predict_probs(network, image, Window((8, 8, 8)))
    assert not torch.allclose(plain, probs, atol=1e-4)


def test_a_volume_of_one_patch_is_predicted_as_by_the_network(network):
    image = torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        expected = torch.softmax(network(image), dim=1)
    found = predict_probs(network, image, Window((8, 8, 8)))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("fidelity", SAMPLERS)
def test_mutual_information_is_between_zero_and_the_entropy(network, fidelity):
    image = torch.randn(1, 1, 8, 8, 8)
    (maps,) = SAMPLERS[fidelity](network, image, Window((8, 8, 8)), 4)
    entropy, information = maps
    assert entropy.shape == information.shape == (8, 8, 8)
    assert (entropy <= np.log(3) + 1e-5).all()
    assert (information >= 0).all()
    assert (information <= entropy + 1e-6).all()
    assert information.max() > 0


class Jitter(nn.Module):
    """Clean logits that differ from voxel to voxel, and passes that add small noise to them."""

    def forward_passes(self, image, passes):
        logits = image * torch.tensor([2.0, 0.0, -1.0]).reshape(1, 3, 1, 1, 1)
        shift = 50 * torch.randn(passes, 1, 1, *image.shape[2:])  # of all classes alike
        noise = 0.2 * torch.randn(passes, *logits.shape) + shift
        return logits, list(logits + noise)


def test_fast_uncertainty_is_that_of_many_passes_whose_logits_differ_a_little():
    torch.manual_seed(0)
    image = torch.randn(1, 1, 6, 8, 8)
    (fast,) = estimate_uncertainty(Jitter(), image, Window((6, 8, 8)), 4000)
    draws = [torch.softmax(draw, 1) for draw in Jitter().forward_passes(image, 4000)[1]]
    _, entropy, information = combine(draws, "noise")
    assert information.max() > 0.01
    assert torch.allclose(fast[1], information[0, 0], atol=0.0015)
    assert torch.allclose(fast[0], entropy[0, 0], atol=0.02)


def test_fast_passes_go_through_every_window_and_are_drawn_in_it(network):
    image, told = torch.randn(1, 1, 20, 9, 8), []
    window = Window((8, 8, 8), flips=(0,))
    slabs = list(estimate_uncertainty(network, image, window, 3, None, told.append))
    entropy, information = torch.cat(slabs, 1)
    assert entropy.shape == image.shape[2:]
    assert (information.amax((1, 2)) > 0).all()
    assert sum(told) == FAST_VIEWS * window.count_windows(image.shape[2:])


def test_the_entropy_of_probs_is_that_of_their_logits_and_never_negative():
    logits = 6 * torch.randn(2, 3, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    values = entropy_of(torch.softmax(logits, 1))
    assert torch.allclose(values, renyi_entropy(logits, 1.0), atol=1e-6)
    certain = torch.tensor([1.0 + 2e-7, 0.0, 0.0]).view(1, 3, 1, 1, 1)  # a mean may round so
    assert entropy_of(certain).item() == 0.0


def test_entropy_and_mutual_information_worked_by_hand():
    draws = [torch.tensor(p).reshape(1, 2, 1, 1, 1) for p in ([0.5, 0.5], [0.9, 0.1])]
    mean, entropy, information = combine(draws, "two models")
    assert mean.flatten().tolist() == pytest.approx([0.7, 0.3])
    of_mean = -0.7 * np.log(0.7) - 0.3 * np.log(0.3)
    of_draws = (np.log(2) - 0.9 * np.log(0.9) - 0.1 * np.log(0.1)) / 2
    assert entropy.item() == pytest.approx(of_mean, abs=1e-6)
    assert information.item() == pytest.approx(of_mean - of_draws, abs=1e-6)


def test_predictions_are_combined_the_same_in_pieces(monkeypatch):
    draws = [torch.softmax(torch.randn(1, 3, 7, 6, 5), 1) for _ in range(3)]
    whole = combine(draws, "three models")
    monkeypatch.setattr(uncertainty, "_PIECE", 3 * 6 * 5 * 2)
    kept = [draw.clone() for draw in draws]
    mean, *doubts = combine(draws, "three models")
    assert torch.equal(mean, whole[0])
    assert all(map(torch.allclose, doubts, whole[1:]))  # a logarithm is not of the same bits
    assert all(map(torch.equal, draws, kept))


def test_predictions_that_do_not_differ_are_an_error():
    with pytest.raises(InputError, match="predictions of mirrorings are the same"):
        combine([torch.full((1, 2, 1, 1, 1), 0.5)] * 3, "mirrorings")


@pytest.mark.parametrize(("num_classes", "last"), [(2, 1.0), (3, np.log(3) / np.log(2))])
def test_the_limit_of_doubt_rises_from_a_part_of_ln_2_to_ln_c(num_classes, last):
    section = UncertaintySection(start=0.75)
    found = [find_limit(section, num_classes, rise) / np.log(2) for rise in (0.0, 0.5, 1.0)]
    assert found == pytest.approx([0.75, (0.75 + last) / 2, last])
    assert find_limit(UncertaintySection(start=None), num_classes, 0.0) == np.inf


@pytest.mark.parametrize("fidelity", SAMPLERS)
@pytest.mark.parametrize(("dropout", "words"), [(0.0, "no active dropout"), (1e-9, "are the same")])
def test_uncertainty_without_active_dropout_is_an_error(tiny_spec, fidelity, dropout, words):
    network = build_network(tiny_spec.model_copy(update={"dropout": dropout})).eval()
    with pytest.raises(InputError, match=words):
        list(SAMPLERS[fidelity](network, torch.randn(1, 1, 8, 8, 8), Window((8, 8, 8)), 2))


def touch(folder, *names):
    folder.mkdir(exist_ok=True, parents=True)
    for name in names:
        (folder / name).touch()
    return [folder]


def test_channels_of_a_scan_are_found_by_their_endings_in_order(tmp_path):
    names = [f"{case}_{channel:04d}.nii.gz" for case, channel in itertools.product("ab", (1, 0))]
    found = find_scans(touch(tmp_path, *names, ".hidden.nii.gz"), 2, [], [])
    assert {case: [p.name for p in files] for case, files in found.items()} == {
        "a": ["a_0000.nii.gz", "a_0001.nii.gz"],
        "b": ["b_0000.nii.gz", "b_0001.nii.gz"],
    }


def test_a_file_with_all_channels_is_one_scan(tmp_path):
    assert list(find_scans(touch(tmp_path, "a.nii.gz", "b.nii"), 2, [], [])) == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "num_channels", "words"),
    [
        (["a_0000.nii"], 2, "a: the model wants 2 channels"),
        (["a_0001.nii", "a_0002.nii"], 2, "a: the model wants 2 channels"),
        (["a.nii", "a.nii.gz"], 1, "two scans of one name"),
        (["x/a.nii", "y/a.nii"], 2, "two scans of one name"),
        (["a.gipl"], 1, "no scan that is read"),
        ([], 1, "no scan that is read"),
    ],
)
def test_files_that_make_no_scan_are_refused(tmp_path, names, num_channels, words):
    for folder in {(tmp_path / name).parent for name in names}:
        folder.mkdir(exist_ok=True)
    for name in names:
        (tmp_path / name).touch()
    folders = sorted({(tmp_path / name).parent for name in names}) or [tmp_path]
    with pytest.raises(InputError, match=words):
        find_scans(folders, num_channels, [], [])


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.nii: no such file"):
        find_scans([tmp_path / "nothing.nii"], 1, [], [])


class DroppingOracle(Oracle):
    """An oracle with dropout that is active and hardly ever drops."""

    def __init__(self, probability=1e-6):
        super().__init__()
        self.dropout = nn.Dropout3d(probability)

    def forward(self, image):
        return 8 * super().forward(self.dropout(image))


def draw_turns(passes, slice_axis=None, seed=0):
    rng = np.random.default_rng(seed)
    return [draw_turn(rng, (0,), slice_axis, (1.0, 1.0, 4.0)) for _ in range(passes - 1)]


def take_samples(network, image, passes=6, slice_axis=None, patch=None):
    patch = patch or (image.shape[2:] if slice_axis is None else image.shape[2:4])
    window = Window(tuple(patch), slice_axis=slice_axis)
    turns = draw_turns(passes, slice_axis)
    slabs = list(sample_probs([network], image, window, turns))
    axis = 1 + window.find_axis(image.shape[2:])
    return [torch.cat(views, axis)[None] for views in zip(*slabs, strict=True)]


def test_passes_in_one_window_are_those_of_the_whole_scan_turned(network):
    image = torch.rand(1, 1, 13, 16, 16)
    torch.manual_seed(3)
    probs = take_samples(network, image, passes=4, patch=(16, 16, 16))
    torch.manual_seed(3)
    first = None
    for number, turn in enumerate([np.eye(3), *draw_turns(4)]):
        with sample_dropout(network):
            view = torch.nn.functional.pad(turn_volume(image, turn, "border"), (0, 0, 0, 0, 1, 2))
            seen = torch.softmax(network(view), 1).detach()[:, :, 1:14]
        back = np.linalg.inv(turn)
        inside = turn_volume(torch.ones_like(image), turn, "zeros")
        inside = turn_volume(inside, back, "zeros").clamp(max=1)
        first = seen if first is None else first
        whole = inside * turn_volume(seen, back, "border") + (1 - inside) * first
        assert torch.allclose(probs[number], whole, atol=1e-5), number


@pytest.mark.parametrize(
    ("slice_axis", "patch"), [(None, None), (2, None), (None, (16, 16, 8)), (2, (16, 16))]
)
def test_passes_from_elsewhere_say_the_same_of_each_voxel(slice_axis, patch):
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (24, 24, 12)), indexing="ij")
    image = torch.stack([(0.6 - sum(axis**2 for axis in axes).sqrt())])[None]
    probs = take_samples(DroppingOracle(), image, slice_axis=slice_axis, patch=patch)
    expected = torch.softmax(8 * torch.cat([-image, image], dim=1), dim=1)
    assert torch.allclose(probs[0], expected, atol=1e-4)
    for other in probs[1:]:
        assert other.shape == expected.shape
        assert torch.allclose(other.sum(1), torch.ones_like(other[:, 0]), atol=1e-4)
        inner = (slice(None), slice(None), *[slice(4, -4)] * 2, slice(3, -3))
        assert (other - expected)[inner].abs().max() < 0.1
        assert not torch.allclose(other, expected, atol=1e-4)


def test_what_a_pass_turned_out_of_the_scan_is_as_in_the_first_pass():
    image = torch.zeros(1, 1, 24, 24, 24)
    image[:, :, 0] = 1.0  # bright at a face, which every rotation moves out
    first, *others = take_samples(DroppingOracle(), image)
    corner = first[0, 1, 0, 0, 0]
    assert all(abs(float(other[0, 1, 0, 0, 0] - corner)) < 0.3 for other in others)


def test_passes_differ_by_their_dropout_and_repeat_with_their_seed():
    image = torch.rand(1, 1, 8, 8, 8)
    first, second = [], []
    for found in (first, second):
        torch.manual_seed(3)
        found += take_samples(DroppingOracle(0.5), image, passes=8)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({float(probs.sum()) for probs in (p[:, 1] for p in first)}) > 1


def test_a_mask_that_cannot_be_written_stops_no_other_and_a_full_disk_is_not_tried_again(
    oracle, tmp_path, monkeypatch
):
    for name in "abc":
        write_scan(tmp_path / "scans" / f"{name}.nii")
    real, tried = predict.write_mask, []

    def fail(error):
        def write(path, *rest, **options):
            tried.append(path.name)
            if path.name == "b.nii.gz":
                raise error
            return real(path, *rest, **options)

        return write

    too_long = OSError(errno.ENAMETOOLONG, "File name too long")
    monkeypatch.setattr(predict, "write_mask", fail(too_long))
    with pytest.raises(SomeFailedError, match=r"1 of 3 .*\n.*b\.nii: OSError.*too long"):
        predict_files(oracle, [tmp_path / "scans"], tmp_path / "out", report=lambda text: None)
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == {"a.nii.gz", "c.nii.gz"}
    full = InputError("the disk is full")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    tried.clear()
    monkeypatch.setattr(predict, "write_mask", fail(full))
    with pytest.raises(SomeFailedError, match=r"2 of 3 .*\n.*disk is full\n.*c\.nii: not tried"):
        predict_files(oracle, [tmp_path / "scans"], tmp_path / "new", report=lambda text: None)
    assert tried == ["a.nii.gz", "b.nii.gz"]


def test_probs_that_find_no_room_on_the_disk_are_an_error_of_the_scan(
    oracle, tmp_path, monkeypatch
):
    def fail(file, start, size):
        assert size == 4 * 2 * 12**3
        raise OSError(errno.ENOSPC, "No space left on device")

    write_scan(tmp_path / "a.nii", shape=(12, 12, 12))
    write_scan(tmp_path / "b.nii", shape=(12, 12, 12))
    monkeypatch.setattr(runs.os, "posix_fallocate", fail)
    with pytest.raises(InputError, match=r"a\.nii: .*the disk is full.*\n.*b\.nii: not tried"):
        predict_files(oracle, [tmp_path], tmp_path / "out", probs=True, report=lambda text: None)
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_a_scan_in_parts_gets_the_mask_of_the_scan_as_a_whole(saved, tmp_path, monkeypatch):
    write_scan(tmp_path / "a.nii", ANISOTROPIC, (30, 26, 8))
    model = load_model(saved)
    told = []
    options = {"passes": 2, "probs_in": tmp_path, "advance": told.append}
    whole = predict_case(model, (tmp_path / "a.nii",), **options)
    num_windows = sum(told)
    monkeypatch.setattr(predict, "SLAB_BYTES", 1)
    monkeypatch.setattr(windows, "MOST_PARTS", 3)
    parts = predict_case(model, (tmp_path / "a.nii",), **options)
    assert sum(told) > 2.2 * num_windows, "parts repeat the windows that they share"
    assert np.array_equal(whole.mask, parts.mask)
    np.testing.assert_allclose(parts.probs, whole.probs, atol=1e-5)
    assert abs(parts.uncertainty - whole.uncertainty).mean() < 0.05


def test_where_memory_runs_out_a_scan_is_cut_again_and_goes_on(oracle, tmp_path, monkeypatch):
    box = write_scan(tmp_path / "a.nii", shape=(30, 26, 18))
    whole = predict_case(oracle, (tmp_path / "a.nii",)).mask
    tried = []

    def refuse_large(network, image, window, mirrored, part, *rest):
        sizes = [p.stop - p.start for p in part]
        tried.append(sizes)
        slabs = slide_window(network, image, window, mirrored, part, *rest)
        yield next(slabs)
        if min(sizes) > 12:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        yield from slabs

    monkeypatch.setattr(predict, "slide_window", refuse_large)
    mask = predict_case(oracle, (tmp_path / "a.nii",)).mask
    assert len(tried) > 2
    assert np.array_equal(mask, whole)
    assert dice(mask == 1, box) >= 0.99
