import json
import signal
import time

import nibabel as nib
import numpy as np
import processes
import pytest
import torch

from medssl.costs import Costs, forecast_costs
from medssl.networks.build import build_network
from medssl.predict import MC_PASSES, Model, describe_model, predict_case, save_model


def write_noise(path, shape=(30, 26, 20), spacing=(1.0, 1.0, 1.0)):
    voxels = np.random.default_rng(0).normal(50, 20, shape).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([*spacing, 1])), path)
    return path


@pytest.fixture
def model(tiny_plan, tiny_spec):
    torch.manual_seed(0)
    plan = tiny_plan.model_copy(update={"patch_size": (16, 16, 16), "flips": (0, 2)})
    info = describe_model(plan, {})
    return Model(build_network(tiny_spec).eval(), info, torch.device("cpu"))


@pytest.mark.parametrize("uncertainty", [False, True])
def test_as_many_windows_are_forecast_as_go_through_the_network(model, tmp_path, uncertainty):
    scans = {
        "a": (write_noise(tmp_path / "a.nii"),),
        "b": (write_noise(tmp_path / "b.nii", (20, 9, 40), (1.7, 1.0, 0.8)),),
    }
    told = []
    for images in scans.values():
        predict_case(model, images, passes=MC_PASSES * uncertainty, advance=told.append)
    costs = forecast_costs(model, scans, uncertainty=uncertainty)
    assert costs.num_windows == sum(told) > 4


def test_costs_grow_with_the_scan_and_what_is_written_of_it(model, tmp_path):
    small = {"a": (write_noise(tmp_path / "a.nii", (20, 20, 20)),)}
    large = {"b": (write_noise(tmp_path / "b.nii", (90, 90, 60)),)}
    few, many, maps = (
        forecast_costs(model, small),
        forecast_costs(model, large),
        forecast_costs(model, large, probs=True, uncertainty=True),
    )
    assert few.num_windows < many.num_windows < maps.num_windows
    assert few.peak < many.peak
    assert few.disk < many.disk < 90 * 90 * 60 * 4 * 3 < maps.disk


def test_a_scan_that_cannot_be_read_costs_nothing_and_is_left_to_be_named_later(model, tmp_path):
    (tmp_path / "bad.nii").write_bytes(b"no scan")
    assert forecast_costs(model, {"bad": (tmp_path / "bad.nii",)}).num_windows == 0


def test_costs_are_told_beside_what_there_is(tmp_path):
    told = Costs(peak=2.5e9, seconds=600, disk=3e7, num_windows=70).describe(3, tmp_path / "new")
    assert told.startswith("3 scans, 70 windows: about 10 minutes; 2.5 GB of memory, ")
    assert "at most 0.03 GB of disk" in told
    told = Costs(peak=2.5e9, seconds=1.2, disk=3e7, num_windows=1).describe(1, tmp_path / "new")
    assert told.startswith("1 scan, 1 windows: about a second; ")


@pytest.fixture
def saved(model, tmp_path):
    save_model(tmp_path / "run" / "model", model.network, model.info)
    return tmp_path / "run"


@pytest.mark.slow
def test_ctrl_c_leaves_finished_scans_and_no_half_file(saved, tmp_path):
    write_noise(tmp_path / "in" / "a.nii", (12, 12, 12))
    write_noise(tmp_path / "in" / "b.nii", (200, 200, 200))
    command = ("-m", "medssl", "predict", saved, tmp_path / "in", "--probs")
    told, errors = tmp_path / "told", tmp_path / "errors"
    with told.open("w") as stdout, errors.open("w") as stderr:
        process = processes.Process(
            *command, "--out", tmp_path / "out", stdout=stdout, stderr=stderr
        )
    while process.poll() is None and told.read_text().count("\n") < 2:
        time.sleep(0.01)
    first, second = told.read_text().splitlines()
    assert first.startswith("2 scans, ")
    assert second.startswith(str(tmp_path / "out" / "a.nii.gz"))
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, errors.read_text()
    words = f"stopped: the masks of finished scans stand in {tmp_path / 'out'}\n"
    assert errors.read_text() == words
    names = ["a.nii.gz", "a_probs.nii.gz", "predictions.json", "predictions.jsonl"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert set(json.loads((tmp_path / "out" / "predictions.json").read_text())["scans"]) == {"a"}


CHILD = """
import resource, sys
from pathlib import Path
import psutil, torch
from medssl import predict
from medssl.predict import Model, load_model, predict_files

info, scans, out = load_model(Path(sys.argv[1])).info, Path(sys.argv[2]), Path(sys.argv[3])
model = Model(torch.nn.Conv3d(1, 3, 1).eval(), info, torch.device("cpu"))
model.network.bias.data = torch.tensor([0.0, 0.5, 0.0])
model.network.weight.data = torch.tensor([-1.0, 0.1, 1.0]).reshape(3, 1, 1, 1, 1)
tried, real = [], predict.slide_window

def slide(network, image, window, mirrored, box, advance):
    tried.append([part.stop - part.start for part in box])
    return real(network, image, window, mirrored, box, advance)

predict.slide_window = slide
predict.count_free_memory = lambda device: 1e12  # as where nobody says what there is
predict_files(model, [scans / "small.nii"], out, report=str)
tried.clear()
if room := int(sys.argv[4]):
    limit = psutil.Process().memory_info().vms + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
predict_files(model, [scans / "a.nii"], out, report=str)
print(tried)
"""


@pytest.mark.slow
def test_under_a_limit_of_memory_a_scan_is_segmented_in_smaller_slabs(model, tmp_path):
    changes = {"patch_size": (64, 64, 64), "flips": (0, 1, 2)}
    save_model(tmp_path / "run" / "model", model.network, model.info.model_copy(update=changes))
    write_noise(tmp_path / "in" / "a.nii", (128, 128, 128))
    write_noise(tmp_path / "in" / "small.nii", (40, 40, 40))
    tried, masks = {}, {}
    for room in (0, 130_000_000):  # bytes; the slabs of the whole take 216 million
        out = tmp_path / str(room)
        done = processes.run("-c", CHILD, tmp_path / "run", tmp_path / "in", out, room)
        assert done.returncode == 0, done.stderr
        tried[room] = json.loads(done.stdout.splitlines()[-1])
        masks[room] = np.asanyarray(nib.load(out / "a.nii.gz").dataobj)
    free, bound = tried.values()
    assert free == [[128, 128, 128]] * 8, "eight mirrorings of the whole, side by side"
    assert bound[0] == [128, 128, 128], "which is tried first"
    assert max(bound[-1]) == 128 > min(bound[-1]), "and then parts"
    whole, parts = masks.values()
    assert len(np.unique(whole)) == 3
    assert (whole != parts).mean() <= 1e-6
