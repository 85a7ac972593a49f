"""Models for those who do not have medssl: bundle, ONNX, torch.export, TorchScript, zip, card."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import run_command
from PIL import Image
from test_tracking import SECRETS, write_evaluation, write_run

from medssl.config import InputError
from medssl.data.io import read_origin
from medssl.data.trained import resolve_model
from medssl.export import export_model
from medssl.export.exchange import SUFFIXES, strip_padding
from medssl.export.steps import LoadScand
from medssl.networks.build import NetworkSpec, build_network
from medssl.predict import describe_model, load_model, predict_files, save_model
from medssl.runs import hash_file, read_json, write_json
from medssl.tracking import find_default_uri, sync_run

OBLIQUE = np.array(
    [[-0.9, 0.3, 0.2, 9.0], [0.3, 0.8, 0.3, -7.0], [0.2, -0.2, 1.9, 3.0], [0, 0, 0, 1]]
)
FLAT = {"kernels": ((3, 3),) * 3, "strides": ((1, 1), (2, 2), (2, 2))}
UNET = {"name": "unet", "encoder": "resnet18", "filters": (), "deep_supervision": False}
KINDS = {
    "3d": {},
    "slices": FLAT,
    "pictures": FLAT,
    "unet": {**UNET, "kernels": (), "strides": ()},
}


@pytest.fixture(scope="session")
def make_model(tiny_plan, tiny_spec):
    """Return a function that writes a model of random weights, of a kind."""

    def make(folder, kind="3d"):
        torch.manual_seed(1)
        spec = tiny_spec.model_copy(update={"stochastic_depth": 0.8, **KINDS[kind]})
        spec = NetworkSpec.model_validate(spec.model_dump())
        network = build_network(spec)
        with torch.no_grad():
            for name, weight in network.named_parameters():  # surer, and no class wins by its bias
                is_last = "output_block" in name or "segmentation_head" in name
                weight.mul_(0.0 if is_last and weight.ndim == 1 else 1.5)  # no class wins by bias
        plan = {"network": spec, "flips": (0,)}
        if kind != "3d":
            size = (64, 64) if kind == "unet" else (8, 8)
            plan |= {"slice_axis": 2, "patch_size": size, "flips": (1,)}
        if kind in ("pictures", "unet"):
            recipe = tiny_plan.preprocessing.model_copy(update={"spacing": (None,) * 3})
            plan |= {"has_spacing": kind == "unet", "preprocessing": recipe}
        save_model(folder, network, describe_model(tiny_plan.model_copy(update=plan), {"round": 2}))
        return folder

    return make


def write_scans(folder, kind):
    """Write what is read in different ways: scaled, oblique, in meters; a stack, colors, gray."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    if kind == "pictures":
        values = rng.integers(0, 100, (2, 12, 19), np.uint8)
        Image.fromarray(values[0]).save(folder / "gray.png")
        Image.fromarray(np.stack([values[1]] * 3, -1)).save(folder / "color.jpg")
        pages = [Image.fromarray(page) for page in values]
        pages[0].save(folder / "stack.tif", save_all=True, append_images=pages[1:])
        return folder
    array = rng.normal(50, 30, (11, 13, 7)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, OBLIQUE), folder / "oblique.nii.gz")
    image = nib.Nifti1Image(rng.integers(0, 1000, (9, 8, 10), np.int16), np.diag([-1, 1.2, 1, 1]))
    image.header.set_slope_inter(0.1, -3)
    nib.save(image, folder / "scaled.nii")
    image = nib.Nifti1Image(array, np.diag([-1e-3, 1e-3, 2e-3, 1]))
    image.header.set_xyzt_units("meter")
    image.header["pixdim"][1:4] = 1e-3  # MONAI's reader would follow these, and the qform
    nib.save(image, folder / "meters.nii.gz")
    return folder


@contextlib.contextmanager
def import_scripts(bundle):
    """Find the scripts of a bundle, where it is the working folder, and no others."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(bundle)
        patch.syspath_prepend(str(bundle))
        for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
            patch.delitem(sys.modules, name)
        yield
        for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
            del sys.modules[name]


def run_bundle(bundle, scans, out):
    """Run a bundle in this process, as `python -m monai.bundle run` does."""
    import monai.bundle

    with import_scripts(bundle):
        monai.bundle.run(
            config_file="configs/inference.json", dataset_dir=str(scans), output_dir=str(out)
        )


def ask_bundle(bundle, scan):
    """Return what MONAI Label 0.8.5 makes of a scan: `data` after the transforms of a bundle.

    Its `BundleInferTask` builds and loads a network of its own, so `initialize` and `run` never
    run; it gives a file as a string, and has a device of its own.
    """
    from monai.bundle import ConfigItem, ConfigParser

    with import_scripts(bundle):
        config = ConfigParser()
        config.read_config(bundle / "configs" / "inference.json")
        config.config["bundle_root"] = str(bundle)
        if (bundle / "models" / "model.pt").exists():
            network = config.get_parsed_content("network_def", instantiate=True)
            network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
        else:
            network = torch.jit.load(bundle / "models" / "model.ts")
        config.config["device"] = "cpu"
        config.ref_resolver.items["device"] = ConfigItem(config="cpu", id="device")
        data = {"image": str(scan), "image_path": str(scan), "device": "cpu"}
        for transform in config.get_parsed_content("preprocessing").transforms:
            data = transform(data)
        inferer = config.get_parsed_content("inferer")
        data["pred"] = inferer(data["image"][None], network.eval())[0]
        for transform in config.get_parsed_content("postprocessing").transforms:
            data = transform(data)
        return data


def count_differences(first, second):
    """Return how many voxels differ in two folders of masks, whose files are placed alike."""
    names = {path.name for path in first.iterdir() if not path.name.startswith("predictions")}
    assert names == {path.name for path in second.iterdir()}
    different = total = 0
    for name in names:
        assert read_origin(second / name) == "prediction"
        if name.endswith(".nii.gz"):
            images = [nib.load(folder / name) for folder in (first, second)]
            assert images[0].header == images[1].header
            arrays = [np.asanyarray(image.dataobj) for image in images]
        else:
            arrays = []
            for folder in (first, second):
                with Image.open(folder / name) as picture:
                    arrays.append(np.array(picture))
                    pages = getattr(picture, "n_frames", 1)
                    if pages > 1:
                        picture.seek(1)
                        arrays[-1] = np.stack([arrays[-1], np.array(picture)])
        assert len(np.unique(arrays[0])) > 1  # else a constant would pass
        different += int((arrays[0] != arrays[1]).sum())
        total += arrays[0].size
    return different, total


@pytest.mark.parametrize("kind", ["3d", "slices", "pictures"])
def test_a_bundle_gives_the_masks_of_predict(tmp_path, make_model, kind):
    model, scans = make_model(tmp_path / "model", kind), write_scans(tmp_path / "scans", kind)
    bundle = export_model(model, "monai-bundle", tmp_path / "bundle")
    predict_files(load_model(model), [scans], tmp_path / "ours", report=lambda _: None)
    run_bundle(bundle, scans, tmp_path / "theirs")
    assert count_differences(tmp_path / "ours", tmp_path / "theirs")[0] == 0
    for script in (bundle / "scripts").glob("*.py"):
        assert "import medssl" not in script.read_text()
        assert "from medssl" not in script.read_text()


def save_odd(path, oddity):
    """Write a scan, or a picture, that a bundle must not take as it is."""
    page = Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12))
    if oddity in ("CRC", "sound"):
        noise = np.random.default_rng(0).integers(0, 99, (8, 12, 5), np.int16)
        nib.save(nib.Nifti1Image(noise, np.eye(4)), path)
        content = bytearray(path.read_bytes())
        content[-6] ^= oddity == "CRC"
        path.write_bytes(content)
    elif oddity == "orientation":
        exif = Image.Exif()
        exif[274] = 6
        page.save(path, exif=exif)
    elif oddity == "transparent":
        page.putalpha(page.copy())
        page.save(path)
    else:
        pages = {"save_all": True, "append_images": [page] * 3}
        page.save(path, description=oddity, **pages)


@pytest.mark.parametrize(
    ("name", "oddity", "words"),
    [
        ("a.nii.gz", "sound", ""),
        ("a.nii.gz", "CRC", "CRC"),
        ("a.jpg", "orientation", "save it upright"),
        ("a.png", "transparent", "partly transparent"),
        ("a.tif", "ImageJ=1.53t\nimages=4\nchannels=2\nslices=2\n", "one file a channel"),
        ("a.tif", "ImageJ=1.53t\nimages=4\nframes=4\n", "one file a channel"),
        ("a.tif", '<OME><Pixels SizeC="1" SizeT="4" SizeZ="1"/></OME>', "one file a channel"),
        ("a.tif", "ImageJ=1.53t\nimages=4\nslices=4\n", ""),
    ],
)
def test_a_bundle_refuses_what_programs_read_differently(tmp_path, name, oddity, words):
    path = tmp_path / name
    save_odd(path, oddity)
    load = LoadScand("image", 1)
    if words:
        with pytest.raises((ValueError, OSError), match=words):
            load({"image": str(path)})
    else:
        assert load({"image": str(path)})["image"].shape[1:3] == (8, 12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["3d", "slices", "unet"])
def test_a_bundle_answers_in_monai_label(tmp_path, make_model, kind):
    model, scans = make_model(tmp_path / "model", kind), write_scans(tmp_path / "scans", kind)
    bundle = export_model(model, "monai-bundle", tmp_path / "bundle")
    predict_files(load_model(model), [scans], tmp_path / "ours", report=lambda _: None)
    before = {path for path in bundle.rglob("*") if "__pycache__" not in path.parts}
    for scan in scans.iterdir():
        data = ask_bundle(bundle, scan)
        ours = nib.load(tmp_path / "ours" / f"{scan.name.split('.')[0]}.nii.gz")
        values = np.asanyarray(ours.dataobj)
        assert len(np.unique(values)) > 1
        assert kind != "unet" or 5 in values  # else a wrong numbering would pass
        classes = np.searchsorted([0, 1, 5], values)  # it numbers classes as channel_def does
        assert np.array_equal(data["pred"].numpy(), classes[None])
        assert data["pred"].affine.numpy() == pytest.approx(convert_to_mm(ours))
        assert "spatial_shape" not in data["image"].meta  # else `Restored` resizes the mask to it
    # what lies in the model folder of a server outlives the patient's visit
    assert before == {path for path in bundle.rglob("*") if "__pycache__" not in path.parts}
    about = read_json(bundle / "configs" / "metadata.json")
    assert {"version", "description"} <= set(about)
    layout = about["network_data_format"]
    (image,), (pred,) = layout["inputs"].items(), layout["outputs"].items()
    assert (image[0], pred[0]) == ("image", "pred")
    assert len(image[1]["spatial_shape"]) == (3 if kind == "3d" else 2)
    names = load_model(model).info.labels
    assert {int(index): name for index, name in pred[1]["channel_def"].items()} == names
    assert names[0] == "background"  # which it leaves out by this name


def convert_to_mm(image):
    """Return the affine of an image, in mm."""
    is_meter = image.header.get_xyzt_units()[0] == "meter"
    return np.diag([*[1000.0 if is_meter else 1.0] * 3, 1]) @ image.affine


BLOCK = """
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "medssl":
            raise ImportError(name)
sys.meta_path.insert(0, Block())
sys.path.insert(0, "")  # as -m does
sys.argv = ["monai.bundle", *sys.argv[1:]]
runpy.run_module("monai.bundle", run_name="__main__")
"""
REAL = {
    "Task04_Hippocampus/imagesTr/*.nii.gz": ("3d", 2),
    "isbi_em/images/*.png": ("pictures", 1),
    "acdc_half/images/*.nii.gz": ("unet", 1),
}


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(pattern, marks=[pytest.mark.nightly] * (kind != "unet"))
        for pattern, (kind, _) in REAL.items()
    ],
)
def test_a_bundle_runs_without_medssl_on_real_scans(tmp_path, make_model, pattern):
    kind, count = REAL[pattern]
    files = sorted(Path(os.environ["MEDSSL_DATA"]).resolve().glob(pattern))[:count]
    assert len(files) == count
    scans = tmp_path / "scans"
    scans.mkdir()
    for file in files:
        (scans / file.name).symlink_to(file)
    model = make_model(tmp_path / "model", kind)
    bundle = export_model(model, "monai-bundle", tmp_path / "bundle")
    predict_files(load_model(model), [scans], tmp_path / "ours", report=lambda _: None)
    command = [sys.executable, "-P", "-c", BLOCK, "run", "--config_file", "configs/inference.json"]
    command += ["--dataset_dir", str(scans), "--output_dir", str(tmp_path / "theirs")]
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    different, total = count_differences(tmp_path / "ours", tmp_path / "theirs")
    assert different <= total / 100_000


def load_logits(path):
    """Return a function from images to logits, of an exported network."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda image: torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])
    if path.suffix == ".pt2":
        return torch.export.load(path).module(check_guards=False)
    return torch.jit.load(path)


SLOW = [
    *(("3d", form) for form in SUFFIXES if form != "torchscript"),
    *(("slices", form) for form in SUFFIXES if form != "torchscript"),
    *(("unet", form) for form in SUFFIXES),
]


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("3d", "torchscript"),
        ("slices", "torchscript"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_exported_network_gives_the_logits_at_other_sizes(tmp_path, make_model, kind, form):
    model = make_model(tmp_path / "model", kind)
    out = export_model(model, form, tmp_path / "out")
    about = read_json(out / "description.json")
    network, logits = load_model(model).network, load_logits(out / f"model{SUFFIXES[form]}")
    steps = about["multiple_of"]
    for batch, counts in ((1, (1, 2, 1)), (3, (4, 2, 3))):
        if kind != "3d" and batch == 1:  # a norm over two voxels would multiply rounding by 300
            counts = (2, 3)
        size = [step * count for step, count in zip(steps, counts, strict=False)]
        image = torch.randn(batch, 1, *size)
        with torch.no_grad():
            expected = network(image)
            assert (logits(image) - expected).abs().max() <= 3e-4  # of up to 4
            assert expected.std() > 0.1
    assert about["label_values"] == [0, 1, 5]
    assert about["preprocessing"]["spacing"] == 3 * [None if kind == "unet" else 1.0]
    assert (out / "MODEL_CARD.md").is_file()
    assert strip_padding(network)(image).shape == expected.shape


def test_what_an_export_lacks_is_named_with_the_extra(tmp_path, make_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    model = make_model(tmp_path / "model")
    code, said = run_command("export", model, "--format", "onnx", "--out", tmp_path / "out")
    assert code == 2
    assert "onnx" in said
    assert "pip install 'medssl[export]'" in said
    code, said = run_command("export", model, "--format", "onxx")
    assert code == 2
    assert "torchscript" in said
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    code, said = run_command("export", model, "--format", "torchscript", "--out", tmp_path / "out")
    assert code == 2
    assert "is there already" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_zip_predicts_as_its_folder(tmp_path, make_model):
    run = tmp_path / "run"
    make_model(run / "model")
    scans = write_scans(tmp_path / "scans", "3d")
    code, said = run_command("export", run, "--format", "zip")
    assert (code, said.strip()) == (0, str(run / "model.zip"))
    for name, model in (("folder", run), ("zip", run / "model.zip")):
        code, said = run_command("predict", model, scans, "--out", tmp_path / name)
        assert code == 0, said
    for path in (tmp_path / "folder").glob("*.nii.gz"):
        assert path.read_bytes() == (tmp_path / "zip" / path.name).read_bytes()
    with zipfile.ZipFile(run / "model.zip") as archive:
        assert "Not a medical device" in archive.read("MODEL_CARD.md").decode()


def pack(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def test_a_zip_writes_nowhere_else_and_its_weights_are_checked(tmp_path, make_model):
    model = make_model(tmp_path / "model")
    about, weights = ((model / n).read_bytes() for n in ("model.json", "weights.safetensors"))
    good = [("x/model.json", about), ("x/weights.safetensors", weights)]
    home = tmp_path / "zips"
    home.mkdir()
    away = pack(
        home / "away.zip",
        [*good, ("../../evil.txt", "x"), (f"{tmp_path}/evil.txt", "x")],
    )
    assert load_model(away).info.labels
    slip = pack(home / "slip.zip", [(f"../{n.split('/')[1]}", content) for n, content in good])
    before = sorted(tmp_path.rglob("*"))
    unpacked = resolve_model(slip)
    assert load_model(slip).info.labels
    assert sorted(path.name for path in unpacked.iterdir()) == sorted(
        ["model.json", "weights.safetensors"]
    )
    assert sorted(tmp_path.rglob("*")) == before
    assert not list(tmp_path.rglob("evil.txt"))
    changed = pack(home / "changed.zip", [good[0], (good[1][0], weights[:-1] + b"\x01")])
    with pytest.raises(InputError, match="not the weights"):
        load_model(changed)
    for members in (good[:1], [*good, ("y/model.json", about)], []):
        with pytest.raises(InputError, match="no zip of a model"):
            load_model(pack(home / f"odd{len(members)}.zip", members))
    (home / "text.zip").write_text("no zip")
    cut = home / "cut.zip"
    cut.write_bytes(away.read_bytes()[:-30])
    for path in (home / "text.zip", cut):
        with pytest.raises(InputError, match="copy it again"):
            load_model(path)


def write_whole_run(folder, make_model):
    """Write a finished run with a real model in the place of the fabricated one."""
    run = write_run(folder)
    shutil.rmtree(run / "model")
    make_model(run / "model")
    shutil.copytree(run / "model", run / "round_1" / "model")
    return run


def test_the_card_says_what_was_measured_and_hides_who(tmp_path, make_model):
    run = write_whole_run(tmp_path / "runs" / "a", make_model)
    card = (export_model(run, "zip", tmp_path / "a.zip"), read_card(tmp_path / "a.zip"))[1]
    assert "Not a medical device" in card
    assert "4 labeled scans trained it; it saw 20 more" in card
    assert "No label was found to be marked as made by a model" in card
    assert "Not measured." in card
    write_evaluation(run)
    summary = read_json(run / "evaluation" / "summary.json")
    estimate = {"mean": 0.81234, "low": 0.7, "high": 0.9, "n": 12, "num_patients": 11}
    row = {"dice": estimate, "num_missed": 1, "num_false_alarms": 2}
    more = {"dice": estimate, "classes": {"anterior": row}, "notes": ["anna_schmidt_001 is odd"]}
    write_json(run / "evaluation" / "summary.json", {**summary, **more})
    plan = read_json(run / "plan.json")
    plan["reasons"].append("3 of 4 labels were made by a model of medssl and nobody has changed")
    write_json(run / "plan.json", plan)
    export_model(run, "zip", tmp_path / "b.zip")
    card = read_card(tmp_path / "b.zip")
    assert "Not measured." not in card
    assert "0.812 [0.700, 0.900], n = 12 cases of" in card
    assert "| anterior | 0.812 [0.700, 0.900] | 1 | 2 |" in card
    assert "3 of 4 labels were made by a model" in card
    assert "case_" in card
    assert not [secret for secret in SECRETS if secret in card]
    export_model(run / "round_1", "zip", tmp_path / "c.zip")  # not what was measured? it is
    about = read_json(run / "round_1" / "model" / "model.json")
    about["provenance"]["round"] = 1
    write_json(run / "round_1" / "model" / "model.json", about)
    export_model(run / "round_1", "zip", tmp_path / "d.zip")
    assert "Not measured." in read_card(tmp_path / "d.zip")  # of round 1 nothing was


def read_card(path):
    with zipfile.ZipFile(path) as archive:
        return archive.read("MODEL_CARD.md").decode()


def test_every_prediction_leaves_a_line(tmp_path, make_model):
    model, scans = make_model(tmp_path / "model"), write_scans(tmp_path / "scans", "3d")
    for _ in range(2):
        predict_files(load_model(model), [scans], tmp_path / "out", report=lambda _: None)
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").open()]
    names = sorted(path.name.split(".")[0] for path in scans.iterdir())
    assert [line["scan"] for line in lines] == 2 * names
    for line in lines:
        assert line["model"] == hash_file(model / "weights.safetensors")
        (source,) = line["input"]
        assert source["sha256"] == hash_file(scans / source["file"])
        assert line["output"] == {
            f"{line['scan']}.nii.gz": hash_file(tmp_path / "out" / f"{line['scan']}.nii.gz")
        }
        assert {"time", "medssl", "settings", "device", "precision"} <= set(line)
    assert len({line["settings"] for line in lines}) == 1
    predict_files(
        load_model(model), [scans], tmp_path / "out", uncertainty=True, report=lambda _: None
    )
    last = json.loads((tmp_path / "out/predictions.jsonl").read_text().splitlines()[-1])
    assert last["settings"] != lines[0]["settings"]
    assert len(last["output"]) == 2


@pytest.mark.slow
def test_champion_and_teacher_are_served_by_mlflow(tmp_path, make_model, monkeypatch):
    import mlflow
    import pandas as pd

    run = write_whole_run(tmp_path / "runs" / "a", make_model)
    scans = write_scans(tmp_path / "scans", "3d")
    sync_run(run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", find_default_uri(run.parent))
    predict_files(load_model(run), [scans], tmp_path / "out", report=lambda _: None)
    for alias, version in (("champion", "1"), ("teacher", "2")):
        name = f"models:/Task04_Hippocampus@{alias}"
        client = mlflow.MlflowClient()
        found = client.get_model_version_by_alias("Task04_Hippocampus", alias)
        assert str(found.version) == version
        served = mlflow.pyfunc.load_model(name)
        scan = (scans / "oblique.nii.gz").read_bytes()
        (mask,) = served.predict(pd.DataFrame({"scan": [scan]}))
        (tmp_path / "mask.nii.gz").write_bytes(base64.b64decode(mask))
        ours, theirs = nib.load(tmp_path / "out/oblique.nii.gz"), nib.load(tmp_path / "mask.nii.gz")
        assert ours.header == theirs.header
        assert np.array_equal(ours.dataobj, theirs.dataobj)
