"""What `scripts/measure_robustness.py` does to scans, measures of models, and says of both."""

import importlib.util
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bright import make_model, write_case

from medssl import metrics
from medssl.config import InputError
from medssl.data.cases import Case
from medssl.data.phantoms import make_phantom
from medssl.evaluate import evaluate_model
from medssl.losses.supervised import dice_ce
from medssl.metrics import read_table
from medssl.predict import predict_logits
from medssl.transforms.geometry import Volume

ARTEFACTS = (
    *("motion", "ghosting", "spike", "bias_field"),
    *("noise", "blur", "low_resolution", "contrast"),
)
THICK = np.diag([1.5, 1.5, 6.0, 1.0])


@pytest.fixture
def robustness(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "scripts")
    import measure_robustness

    monkeypatch.setattr(metrics, "NUM_RESAMPLES", 200)
    return measure_robustness


@pytest.fixture
def artefacts(robustness):
    from robustness import artefacts

    return artefacts


@pytest.fixture
def measures(robustness):
    from robustness import measures

    return measures


def make_volume(shape=(32, 36, 8), affine=THICK):
    image, _ = make_phantom(0, 0, shape, "organs")
    return Volume(np.stack([image, -2 * image]).astype(np.float32), affine)


# what is done to scans


def needs_torchio(test):
    skip = pytest.mark.skipif(
        importlib.util.find_spec("torchio") is None, reason="needs the extra robust: torchio"
    )
    return pytest.mark.nightly(pytest.mark.slow(skip(test)))


@needs_torchio
@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_an_artefact_gets_worse_with_its_severity_and_is_the_same_in_every_call(
    artefacts, artefact
):
    volume = make_volume()
    before = volume.array.copy()
    scans = [artefacts.corrupt_scan(volume, "a", artefact, n) for n in artefacts.SEVERITIES]
    assert np.array_equal(volume.array, before)
    distances = [np.sqrt(np.mean((scan.array - before) ** 2)) for scan in scans]
    assert distances[0] > 0
    assert all(np.diff(distances) > 0), distances
    assert {scan.array.shape for scan in scans} == {before.shape}
    assert all(np.array_equal(scan.affine, THICK) for scan in scans)
    again = artefacts.corrupt_scan(volume, "a", artefact, 3)
    assert np.array_equal(again.array, scans[2].array)
    others = [artefacts.corrupt_scan(volume, f"{n}", artefact, 3).array for n in range(6)]
    has_draws = artefact not in ("ghosting", "blur", "low_resolution")
    assert has_draws == any(not np.array_equal(other, again.array) for other in others)


@needs_torchio
@pytest.mark.parametrize("artefact", ["motion", "ghosting", "blur", "low_resolution"])
def test_slices_are_corrupted_one_by_one(artefacts, artefact):
    volume = make_volume()
    order = np.random.default_rng(0).permutation(volume.shape[2])
    shuffled = replace(volume, array=volume.array[..., order])
    one, other = (artefacts.corrupt_scan(v, "a", artefact, 4).array for v in (volume, shuffled))
    assert np.abs(one[..., order] - other).max() < 1e-3 * np.ptp(volume.array)


@needs_torchio
@pytest.mark.parametrize("artefact", ["motion", "low_resolution"])
def test_what_lies_beyond_a_scan_goes_on_with_its_border(artefacts, artefact):
    bright = Volume(np.full((1, 24, 20, 6), 7, np.float32), THICK)
    bright.array[0, 11:13, 9:11] = 0
    corrupted = artefacts.corrupt_scan(bright, "a", artefact, 5).array[0]
    assert corrupted[[0, -1]].min() > 6
    assert corrupted[:, [0, -1]].min() > 6


def test_without_torchio_the_extra_is_named(artefacts, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchio", None)
    with pytest.raises(InputError, match=r"pip install 'medssl\[robust\]'"):
        artefacts.corrupt_scan(make_volume(), "a", "noise", 1)


# what is measured of a model


def test_calibration_is_how_far_confidence_is_from_the_share_that_is_right(measures):
    reference = np.ones((10, 1, 1), np.uint8)
    probs = np.zeros((2, 10, 1, 1), np.float32)
    probs[1, :6], probs[0, 6:] = 0.9, 0.7  # six of ten are right, at 0.9; four are not, at 0.7
    probs[0] = np.where(probs[1] > 0, 1 - probs[1], probs[0])
    probs[1] = 1 - probs[0]
    assert measures.measure_calibration(probs, reference) == pytest.approx(0.6 * 0.1 + 0.4 * 0.7)
    reference[6:] = 255
    assert measures.measure_calibration(probs, reference) == pytest.approx(0.1)
    assert measures.measure_calibration(probs, 0 * reference) is None


def test_calibration_is_measured_at_most_three_voxels_from_the_foreground(measures):
    reference = np.zeros((12, 1, 1), np.uint8)
    reference[0] = 1
    probs = np.stack([1.0 - reference, reference]).astype(np.float32)
    assert measures.measure_calibration(probs, reference) == 0
    probs[:, 4:] = 0.5
    assert measures.measure_calibration(probs, reference) == 0
    probs[:, 3] = 0.5
    assert measures.measure_calibration(probs, reference) > 0


def test_flips_are_a_share_of_the_foreground_of_two_frames(measures):
    one, other = np.zeros((2, 4, 4, 1), np.uint8)
    one[:2], other[:2], other[0, 0] = 1, 1, 2
    other[3, 3] = 1
    assert measures.measure_flips([one, other]) == pytest.approx(2 / 9)
    assert measures.measure_flips([one, other, other]) == pytest.approx(2 / 18)
    assert measures.measure_flips([0 * one, 0 * one]) == 0


@pytest.mark.parametrize("movement", ["rotation", "shift"])
def test_masks_flip_where_a_model_goes_by_the_place_and_not_by_the_scan(measures, movement):
    image = np.zeros((1, 24, 26, 3), np.float32)
    grid = np.indices((24, 26))
    image[0, np.hypot(grid[0] - 11.5, grid[1] - 12.5) < 6] = 1
    volume = Volume(image, THICK)

    def flips(see):
        def predict(scan):
            bright = see(scan.array[0]).astype(np.float32)
            return SimpleNamespace(probs=np.stack([1 - bright, bright]))

        return measures.measure_flips(measures.follow_frames(predict, volume, movement))

    constant = flips(np.ones_like)
    by_scan = flips(lambda scan: scan.clip(0, 1))
    by_place = flips(lambda scan: np.indices(scan.shape)[0] < 3)
    assert constant == 0
    assert by_scan < (0.03 if movement == "rotation" else 1e-6)  # of a disk, by interpolation
    assert by_place > 0.05


def test_frames_turn_by_degrees_in_mm_about_the_middle_of_a_scan(measures):
    volume = Volume(np.zeros((1, 21, 11, 5), np.float32), np.diag([1.0, 2.0, 8.0, 1.0]))
    matrix = measures._move_grid(volume, "rotation", 30.0)
    middle = np.array([10, 5, 2, 1.0])
    assert np.allclose(matrix @ middle, middle)
    cos, sin = 4 * np.cos(np.pi / 6), 4 * np.sin(np.pi / 6)
    for step, expected in (([4, 0, 0, 0], [cos, sin, 0]), ([0, 2, 0, 0], [-sin, cos, 0])):
        turned = volume.affine @ (matrix @ (middle + np.array(step)) - middle)
        assert np.allclose(turned[:3], expected)
    assert np.allclose(
        measures._move_grid(volume, "shift", 2.0) @ middle, middle + np.array([2, 2, 0, 0])
    )


@pytest.mark.parametrize("slice_axis", [None, 1])
def test_the_attack_is_the_way_in_which_the_loss_rises(measures, tiny_plan, slice_axis):
    model = make_model(tiny_plan, slice_axis)
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.normal(size=(1, 1, 9, 7, 11)).astype(np.float32))
    label = rng.integers(0, 3, (9, 7, 11)).astype(np.uint8)
    label[0, 0] = 255
    step = measures.find_attack(model, image, label)
    assert step.shape == image.shape
    assert set(step.unique().tolist()) == {-1.0, 1.0}
    down, here, up = (
        measures.measure_loss(model, image + epsilon * step, label).item()
        for epsilon in (-0.02, 0.0, 0.02)
    )
    anywhere = 0.02 * torch.randn(image.shape).sign()
    random = measures.measure_loss(model, image + anywhere, label).item()
    assert down < here < up
    assert up - here > 2 * abs(random - here)


@pytest.mark.parametrize("slice_axis", [None, 2])
def test_an_attacked_scan_goes_through_the_network_as_a_predicted_one_does(
    measures, tiny_plan, slice_axis
):
    model = make_model(tiny_plan, slice_axis)
    rng = np.random.default_rng(0)
    shape = (7, 3, 5)  # in one window, which is larger than the strides ask for
    image = torch.from_numpy(rng.normal(size=(1, 1, *shape)).astype(np.float32))
    label = rng.integers(0, 3, shape).astype(np.uint8)
    logits = predict_logits(model.network, image, model.info.window)
    target = torch.from_numpy(label)[None, None].long()
    expected = float(dice_ce(logits, target))
    assert measures.measure_loss(model, image, label).item() == pytest.approx(expected, rel=1e-4)


def test_a_clean_scan_is_worth_what_evaluate_says(robustness, tiny_plan, tmp_path):
    case = write_case(tmp_path)
    model = make_model(tiny_plan)
    evaluate_model(model, [case], tmp_path / "out", report=lambda line: None)
    (expected,) = read_table(tmp_path / "out" / "per_case.csv")
    names = ["clean", "fgsm", "rotation", "clean"]
    changes = [
        robustness.Change(name, severity)
        for name, severity in zip(names, (0, 3, 0, 0), strict=True)
    ]
    clean, attacked, turned, again = robustness.measure_case(model, case, None, changes)
    for key in ("dice/organ", "dice/lesion", "dice"):
        assert float(clean[key]) == pytest.approx(expected[key], abs=1e-4)
        assert expected[key] > 0.1
    assert again == clean
    assert 0 < float(clean["ece"]) < 1
    assert float(attacked["dice"]) < float(clean["dice"])
    assert (turned["dice"], turned["ece"]) == (None, None)
    assert 0 < float(turned["flips"]) < 1


# the study


@pytest.fixture
def measured(robustness, monkeypatch, tmp_path):
    """The cases that are measured, of runs of draw 0 that have three; Dice is 0.5."""
    calls = []

    def measure(model, case, ignore, changes):
        calls.append((model, case.case_id, list(changes)))
        for name, severity in changes:
            yield {"change": name, "severity": severity, "flips": None, "ece": "0.1", "dice": "0.5"}

    cases = [Case(f"c{n}", (), None, f"p{n}") for n in range(3)]
    monkeypatch.setattr(robustness, "measure_case", measure)
    monkeypatch.setattr(robustness, "load_model", lambda folder: folder.name)
    monkeypatch.setattr(robustness, "open_test_cases", lambda *_: (None, None, cases, []))
    for arm in ("labels", "recipe"):
        (tmp_path / "runs" / f"draw_0_{arm}").mkdir(parents=True)
    return calls


def test_what_stands_in_the_csv_is_not_measured_again(robustness, measured, tmp_path):
    runs, path = tmp_path / "runs", tmp_path / "r.csv"
    robustness.run_arm(runs, path, 0, "labels", ["clean", "noise"], 2)
    assert [call[:2] for call in measured] == [("draw_0_labels", "c0"), ("draw_0_labels", "c2")]
    assert measured[0][2] == [("clean", 0), *(("noise", n) for n in range(1, 6))]
    robustness.run_arm(runs, path, 0, "labels", ["noise", "clean"], 2)
    assert len(measured) == 2
    robustness.run_arm(runs, path, 0, "labels", ["clean", "shift"], None)
    assert [call[2] for call in measured[2:]] == [
        [("shift", 0)], [("clean", 0), ("shift", 0)], [("shift", 0)],
    ]  # fmt: skip
    robustness.run_arm(runs, path, 0, "recipe", ["clean"], 1)
    rows = robustness.read_rows(path)
    assert len(rows) == 2 * 6 + 2 + 2 + 1
    assert rows[0] == {
        **{"draw": "0", "arm": "labels", "case_id": "c0", "patient_id": "p0", "change": "clean"},
        **{"severity": "0", "flips": "", "ece": "0.1", "dice": "0.5"},
    }


def test_a_run_that_is_not_there_is_a_mistake_with_a_name(
    robustness, measured, tmp_path, monkeypatch, capsys
):
    options = ["x", str(tmp_path / "runs"), "--csv", str(tmp_path / "r.csv"), "--draws", "4"]
    monkeypatch.setattr("sys.argv", options)
    with pytest.raises(SystemExit) as ended:
        robustness.main()
    assert ended.value.code == 2
    assert "draw_4_labels: no such run" in capsys.readouterr().err


# the tables


def write_rows(path, arms, draws=("0", "1"), num_cases=8):
    """Of each arm the Dice of a case under a change in a severity, by a function."""
    lines = ["draw,arm,case_id,patient_id,change,severity,flips,ece,dice/organ,dice"]
    changes = [("clean", 0), *((name, n) for name in ("noise", "blur") for n in range(1, 6))]
    changes += [("fgsm", n) for n in (1, 2, 3)]
    for arm, (dice, flips) in arms.items():
        for draw in draws:
            for case in range(num_cases):
                about = f"{draw},{arm},c{case},p{case // 2}"
                for name, n in changes:
                    value = dice(name, n, int(draw), case)
                    lines.append(f"{about},{name},{n},,{0.1 * n / 5},{value},{value}")
                lines += [f"{about},{name},0,{flips},,," for name in ("rotation", "shift")]
    path.write_text("\n".join(lines) + "\n")
    return path


def fall(loss):
    """Dice that falls from 0.8 by a loss in each severity, and twice as fast under blur."""
    return lambda name, n, draw, case: 0.8 - loss * n * (1 + (name == "blur"))


def test_errors_are_multiples_of_those_of_the_other_arm(robustness, tmp_path):
    arms = {"recipe": (fall(0.02), 0.1), "labels": (fall(0.04), 0.4)}
    rows = robustness.read_rows(write_rows(tmp_path / "r.csv", arms))
    pairs = {arm: robustness.pair_arms(rows, arm, "labels") for arm in ("labels", "recipe")}
    labels, recipe = robustness.tabulate_arms(pairs)
    assert str(labels["mCE"]) == str(labels["mFR"]) == "1.000 [1.000, 1.000]"
    noise, blur = ((5 * 0.2 + 0.02 * k) / (5 * 0.2 + 0.04 * k) for k in (15, 30))
    assert recipe["mCE"].mean == pytest.approx((noise + blur) / 2)
    assert recipe["relative mCE"].mean == pytest.approx(0.5)
    assert recipe["mFR"].mean == pytest.approx(0.25)
    assert (recipe["dice"], recipe["draws"], recipe["cases"]) == ("0.800", "0, 1", 8)
    assert recipe["dice with artefacts"] == "0.710"
    first, second = robustness.tabulate_artefacts(pairs)
    assert (first["artefact"], second["artefact"]) == ("noise", "blur")
    assert second["dice of labels"] == "0.720 0.640 0.560 0.480 0.400"
    assert first["CE of recipe"].mean == pytest.approx(noise)
    row = robustness.tabulate_severities(pairs)[1]
    assert [row["ece, clean"], row["severity 1"], row["severity 5"]] == ["0.000", "0.020", "0.100"]
    assert row["dice, FGSM 0.1"] == "0.740"
    assert row["gain, 0.1"].startswith("+0.0600")


def test_relative_errors_are_summed_over_artefacts_and_not_averaged(robustness, tmp_path):
    def lose_less(name, n, draw, case):
        return 0.8 - n * {"noise": 0.02, "blur": 0.08}.get(name, 0.0)

    arms = {"recipe": (lose_less, 0.1), "labels": (fall(0.04), 0.1)}
    rows = robustness.read_rows(write_rows(tmp_path / "r.csv", arms))
    (recipe,) = robustness.tabulate_arms({"recipe": robustness.pair_arms(rows, "recipe", "labels")})
    assert recipe["relative mCE"].mean == pytest.approx((0.02 + 0.08) / (0.04 + 0.08))


def test_cases_are_spread_over_all_of_them(robustness):
    assert robustness.spread("abcdefgh", 3) == ["a", "d", "h"]
    assert robustness.spread("abc", 5) == robustness.spread("abc", None) == ["a", "b", "c"]


def test_what_only_one_arm_has_does_not_count(robustness, tmp_path):
    arms = {"recipe": (lambda name, n, draw, case: 0.9 - 0.4 * (case == 7), 0.1)}
    rows = robustness.read_rows(write_rows(tmp_path / "a.csv", arms))
    arms = {"labels": (fall(0), 0.1)}
    rows += robustness.read_rows(
        write_rows(tmp_path / "b.csv", arms, draws=("1", "2"), num_cases=7)
    )
    pair = robustness.pair_arms(rows, "recipe", "labels")
    assert (pair.draws, len(pair.patients)) == (["1"], 7)
    (row,) = robustness.tabulate_arms({"recipe": pair})
    assert row["mCE"].mean == pytest.approx(0.5)
    incomplete = [row for row in rows if (row["change"], row["severity"]) != ("noise", "5")]
    pair = robustness.pair_arms(incomplete, "recipe", "labels")
    (row,) = robustness.tabulate_artefacts({"recipe": pair})[1:]
    assert row["artefact"] == "blur"
    assert np.isnan(pair.add_errors("noise")).all()


def test_a_false_alarm_that_only_one_model_has_is_an_error_of_it_alone(robustness):
    rows = [
        {"draw": "0", "arm": arm, "case_id": "c", "patient_id": "p", "change": "clean"}
        | {"severity": "0", "flips": "", "ece": "", "dice/a": dice, "dice/b": "0.8", "dice": "0.4"}
        for arm, dice in (("labels", "0.0"), ("recipe", ""))
    ]
    pair = robustness.pair_arms(rows, "recipe", "labels")
    assert pair.get_dice("clean")[0].ravel() == pytest.approx([0.9, 0.4])


def test_the_interval_is_over_draws_and_patients(robustness):
    rng = np.random.default_rng(0)
    theirs = rng.uniform(0.2, 0.4, (3, 20))
    alike = np.array([0.5 * theirs, theirs])
    ratio = robustness.compare_sums([alike], [f"p{n // 2}" for n in range(20)])
    assert tuple(ratio) == pytest.approx((0.5, 0.5, 0.5))
    by_draw = np.array([np.array([[0.2], [0.5], [0.8]]) * theirs, theirs])
    wide = robustness.compare_sums([by_draw], [f"p{n // 2}" for n in range(20)])
    by_case = np.array([np.tile([0.2, 0.2, 0.8, 0.8], 5) * theirs, theirs])
    narrow = robustness.compare_sums([by_case], [f"p{n // 2}" for n in range(20)])
    assert wide.low < 0.3 < 0.7 < wide.high
    assert 0.2 < narrow.low < narrow.mean < narrow.high < 0.8
    assert narrow.high - narrow.low < wide.high - wide.low
    nothing = np.zeros((2, 3, 20))
    assert robustness.compare_sums([alike, nothing], [f"p{n}" for n in range(20)]).mean == 0.5
    assert robustness.compare_sums([nothing], [f"p{n}" for n in range(20)]) is None


def test_the_hardest_cases_of_a_draw_are_chosen_by_the_other_draws(robustness):
    labels = np.full((3, 8), 0.8)
    labels[0, 2] = 0.0  # bad luck of draw 0 alone
    labels[:, 5] = 0.6  # a hard case
    recipe = np.full((3, 8), 0.9)
    recipe[:, 4] = 0.1  # nothing to do with labels alone
    chosen = robustness.pick_hardest(np.array([recipe, labels]))
    assert chosen.sum(1).tolist() == [2, 2, 2]
    assert chosen[:, 5].all()
    assert not chosen[0, 2]
    assert chosen[1:, 2].all()
    assert not chosen[:, 4].any()
    alone = robustness.pick_hardest(np.array([recipe[:1], labels[:1]]))
    assert np.flatnonzero(alone[0]).tolist() == [2, 4]  # means of 0.45 and 0.45, next 0.75


def test_the_command_prints_the_tables(robustness, tmp_path, monkeypatch, capsys):
    path = write_rows(
        tmp_path / "r.csv", {"recipe": (fall(0.02), 0.1), "labels": (fall(0.04), 0.4)}
    )
    options = ["x", str(tmp_path), "--csv", str(path), "--table"]
    monkeypatch.setattr("sys.argv", options)
    robustness.main()
    printed = capsys.readouterr().out
    assert "| recipe | 0, 1 | 8 | 0.800 | 0.710 |" in printed
    assert "| noise | 0.760 0.720 0.680 0.640 0.600 |" in printed
    monkeypatch.setattr("sys.argv", [*options, "--against", "round_0"])
    robustness.main()
    assert capsys.readouterr().out == "\n"
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path), "--csv", f"{path}x", "--table"])
    with pytest.raises(SystemExit, match="2"):
        robustness.main()
    assert f"{path}x: no such file" in capsys.readouterr().err
    with pytest.raises(robustness.argparse.ArgumentTypeError, match="there are clean, motion"):
        robustness.split_changes("noize")
