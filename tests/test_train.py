import math
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch

from medssl.config import InputError
from medssl.data.cache import CachedCase
from medssl.data.loaders import iterate_batches
from medssl.networks.build import build_network
from medssl.objective import Objective
from medssl.runs import Journal, StopFlag, hash_json, read_json
from medssl.settings import hash_config
from medssl.train import Progress, _identify, find_lr, train_model

TIMES = ("monitors/data_wait", "monitors/steps_per_second")


class Spoiled(Objective):
    """An objective whose loss is not finite at some steps."""

    bad = frozenset()
    num_steps = 1

    def forward(self, labeled, unlabeled, progress, generator):
        terms = super().forward(labeled, unlabeled, progress, generator)
        if round(progress * self.num_steps) in self.bad:
            terms["supervised"] = terms["supervised"] * float("nan")
        return terms


@pytest.fixture(scope="module")
def train_in(tiny_config, tiny_plan, make_dataset, stop_at):
    """Return a function that trains in a folder and gives the objective and the steps done."""

    def run(
        folder, stop=None, round_index=1, bad=(), config=None, plan=None, kind=Spoiled, **options
    ):
        config, plan = config or tiny_config, plan or tiny_plan
        torch.manual_seed(round_index)
        names = ("background", "organ", "lesion")
        objective = kind(build_network(plan.network), config, names)
        objective.bad, objective.num_steps = frozenset(bad), plan.steps
        flag = stop if hasattr(stop, "is_set") else stop_at(stop)
        dataset = make_dataset(round_index, seed=config.train.seed)
        steps = train_model(objective, dataset, config, plan, folder, round_index, flag, **options)
        return objective, steps

    return run


@pytest.fixture
def start(train_in, tmp_path):
    """Return a function that trains in a folder of this test."""
    return lambda **options: train_in(tmp_path / "run", **options)


@pytest.fixture(scope="module")
def whole(train_in, tmp_path_factory):
    """The folder of an uninterrupted run of 8 steps."""
    folder = tmp_path_factory.mktemp("whole")
    _, steps = train_in(folder)
    assert steps == 8
    return folder


def read_checkpoint(folder, round_index=1):
    path = folder / f"round_{round_index}" / "checkpoint.pt"
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same(first, second, place=""):
    assert type(first) is type(second), place
    if isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key in first:
            assert_same(first[key], second[key], f"{place}/{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), place
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{place}/{index}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), place
    else:
        assert first == second, place


def read_journal(folder):
    entries = Journal(folder / "metrics.jsonl").read()
    return [
        (e["round"], e["step"], {k: v for k, v in e["metrics"].items() if k not in TIMES})
        for e in entries
    ]


def assert_same_run(first, second):
    left, right = read_checkpoint(first), read_checkpoint(second)
    for part in ("step", "objective", "optimizer", "identity"):
        assert_same(left[part], right[part], part)
    assert read_journal(first) == read_journal(second)


@pytest.mark.parametrize("stops", [(1,), (4,), (5,), (3, 2)], ids=str)
def test_a_run_that_was_stopped_and_resumed_is_the_same_to_the_last_bit(
    start, whole, tmp_path, stops
):
    for number, stop in enumerate(stops):
        objective, steps = start(stop=stop)
        assert steps == sum(stops[: number + 1])
    objective, steps = start()
    assert steps == 8
    assert_same_run(tmp_path / "run", whole)
    assert_same(dict(objective.state_dict()), dict(read_checkpoint(whole)["objective"]))


def test_a_checkpoint_of_another_memory_layout_goes_on_as_its_own(start, whole, tmp_path):
    start(stop=4)
    path = tmp_path / "run" / "round_1" / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    states = content["optimizer"]["state"].values()
    layouts = [(s["exp_avg"].stride(), s["exp_avg"].contiguous().stride()) for s in states]
    assert any(now != then for now, then in layouts)
    for state in states:
        state.update({name: value.contiguous() for name, value in state.items()})
    torch.save(content, path)
    start()
    assert_same_run(tmp_path / "run", whole)


def test_a_checkpoint_holds_the_average_and_the_thresholds(whole):
    state = read_checkpoint(whole)["objective"]
    assert state["teacher.n_averaged"] == 8
    assert state["thresholds.predicted"].sum() > 0
    assert any(key.startswith("teacher.module.") for key in state)


def test_what_was_logged_after_the_checkpoint_is_not_logged_twice(start, whole, tmp_path):
    class Killed:
        """A stop flag that ends the process in step 7, after the log and before the checkpoint."""

        calls = 0

        def is_set(self):
            self.calls += 1
            if self.calls == 7:
                raise KeyboardInterrupt
            return False

    with pytest.raises(KeyboardInterrupt):
        start(stop=Killed())
    assert [step for _, step, _ in read_journal(tmp_path / "run")] == [2, 4, 6]
    assert read_checkpoint(tmp_path / "run")["step"] == 4
    start()
    assert_same_run(tmp_path / "run", whole)


def test_a_finished_round_is_not_trained_again(train_in, whole):
    before = read_checkpoint(whole)
    objective, steps = train_in(whole, validate=pytest.fail)
    assert steps == 8
    assert_same(before, read_checkpoint(whole))
    assert_same(dict(objective.state_dict()), dict(before["objective"]))


def test_another_seed_gives_other_losses(start, whole, tmp_path, tiny_config):
    section = tiny_config.train.model_copy(update={"seed": 1})
    start(config=tiny_config.model_copy(update={"train": section}), stop=2)
    losses = [read_journal(folder)[0][2]["losses/total"] for folder in (tmp_path / "run", whole)]
    assert losses[0] != losses[1]


def test_the_number_of_workers_changes_no_bit(start, whole, tmp_path, tiny_plan):
    start(plan=tiny_plan.model_copy(update={"workers": 2}))
    assert_same_run(tmp_path / "run", whole)


def test_a_run_may_go_on_with_other_workers_and_threads(start, whole, tmp_path, tiny_plan):
    start(stop=3)
    start(plan=tiny_plan.model_copy(update={"workers": 1, "threads": 7}))
    assert_same_run(tmp_path / "run", whole)


def test_a_checkpoint_of_another_plan_or_configuration_is_refused(start, tiny_plan, tiny_config):
    start(stop=2)
    section = tiny_config.train.model_copy(update={"lr": 0.5})
    with pytest.raises(InputError, match="made with another plan or configuration"):
        start(config=tiny_config.model_copy(update={"train": section}))
    with pytest.raises(InputError, match="--restart"):
        start(plan=tiny_plan.model_copy(update={"steps": 9}))


def test_a_checkpoint_that_would_execute_something_is_refused(start, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / "run" / "round_1" / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(Attack(), protocol=2))
    with pytest.raises(InputError, match="cannot be read"):
        start()
    torch.save({"identity": Attack()}, path)
    with pytest.raises(InputError, match="cannot be read"):
        start()
    assert not (tmp_path / "executed").exists()


def test_a_damaged_checkpoint_is_named(start, tmp_path):
    start(stop=2)
    path = tmp_path / "run" / "round_1" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"checkpoint\.pt: .*delete it"):
        start()


def test_a_kill_while_saving_keeps_the_checkpoint_before(start, whole, tmp_path, monkeypatch):
    start(stop=4)
    save = torch.save

    def die(content, path):
        save(content, path)
        path.write_bytes(path.read_bytes()[:1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die)
        with pytest.raises(KeyboardInterrupt):
            start()
    assert read_checkpoint(tmp_path / "run")["step"] == 4
    assert read_json(tmp_path / "run" / "state.json")["step"] == 4
    start()
    assert_same_run(tmp_path / "run", whole)


def test_a_non_finite_loss_is_skipped_and_counted(start, tmp_path):
    objective, steps = start(bad={2, 3})
    assert steps == 8
    assert objective.teacher.n_averaged == 6
    journal = read_journal(tmp_path / "run")
    counted = {step: metrics["monitors/nonfinite"] for _, step, metrics in journal}
    assert counted == {2: 0, 4: 2, 6: 0, 8: 0}
    assert "losses/total" not in journal[1][2]
    assert all(torch.isfinite(parameter).all() for parameter in objective.student.parameters())


def test_monitors_may_be_numbers_or_tensors_and_absent_ones_play_no_part(start, tmp_path):
    class Watched(Spoiled):
        def forward(self, *arguments):
            terms = super().forward(*arguments)
            step = round(arguments[2] * self.num_steps)
            self.monitors["number"] = step
            self.monitors["seldom"] = torch.tensor([float(step)]) if step % 2 else math.nan
            self.monitors["large"] = torch.tensor(0.1, dtype=torch.float64)
            return terms

    start(kind=Watched, bad={3})
    journal = {step: metrics for _, step, metrics in read_journal(tmp_path / "run")}
    assert [journal[step]["monitors/number"] for step in (2, 4, 6, 8)] == [0.5, 2, 4.5, 6.5]
    assert [journal[step].get("monitors/seldom") for step in (2, 4, 6, 8)] == [1, None, 5, 7]
    assert journal[8]["monitors/large"] == 0.1


def test_a_skipped_step_moves_neither_student_nor_teacher_nor_optimizer(start, tmp_path):
    start(stop=4)
    before = read_checkpoint(tmp_path / "run")
    start(stop=1, bad={4})
    after = read_checkpoint(tmp_path / "run")
    assert after["step"] == 5
    for key, value in before["objective"].items():
        if not key.startswith("thresholds."):
            assert torch.equal(value, after["objective"][key]), key
    assert_same(before["optimizer"]["state"], after["optimizer"]["state"])


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_gradients_beyond_the_limit_are_clipped_to_it_and_told_as_they_were(
    train_in, tmp_path, tiny_config, tiny_plan, limit
):
    section = tiny_config.train.model_copy(update={"grad_clip": limit})
    config = tiny_config.model_copy(update={"train": section})
    plan = tiny_plan.model_copy(update={"steps": 1})
    objective, _ = train_in(tmp_path, config=config, plan=plan)
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    norm = read_journal(tmp_path)[-1][2]["monitors/grad_norm"]
    assert 1e-3 < norm < 1e3
    applied = float(torch.nn.utils.get_total_norm(gradients))
    assert applied == pytest.approx(min(norm, limit), rel=1e-4)


def test_ten_non_finite_losses_in_a_row_stop_with_the_checkpoint_intact(start, tmp_path, tiny_plan):
    plan = tiny_plan.model_copy(update={"steps": 20})
    start(stop=3, plan=plan)
    with pytest.raises(FloatingPointError, match=r"step 14: .* 11 steps in a row.*train\.lr"):
        start(bad=range(100), plan=plan)
    found = read_checkpoint(tmp_path / "run")
    assert all(torch.isfinite(v).all() for v in found["objective"].values())
    assert found["objective"]["teacher.n_averaged"] == 3


def test_a_stop_writes_a_checkpoint_after_the_current_step(start, tmp_path):
    _, steps = start(stop=3)
    assert steps == 3
    assert read_checkpoint(tmp_path / "run")["step"] == 3
    assert read_json(tmp_path / "run" / "state.json") == {
        "status": "running",
        "round": 1,
        "step": 3,
    }


def flip_one_bit_of_a_weight(path):
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    start = content.index(largest.filename.encode()) + len(largest.filename)
    content[start + largest.file_size // 2] ^= 64
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip_one_bit_of_a_weight,
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        lambda path: torch.save({"step": 4}, path),
        lambda path: torch.save([1], path),
        lambda path: torch.save({**torch.load(path, weights_only=True), "objective": {}}, path),
        lambda path: path.write_bytes(pickle.dumps({"identity": print})),
    ],
    ids=["flip", "cut", "keys", "list", "weights", "pickle"],
)
def test_a_damaged_checkpoint_is_named_and_no_unsafe_way_is_advised(
    whole, train_in, tmp_path, damage
):
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run" / "round_1" / "checkpoint.pt")
    with pytest.raises(InputError, match=r"checkpoint\.pt: cannot be read: damaged") as caught:
        train_in(tmp_path / "run")
    assert "weights_only" not in str(caught.value)
    assert "trust" not in str(caught.value)


def test_a_loader_that_finds_its_scan_gone_says_so_without_a_traceback(make_dataset, monkeypatch):
    def vanish(self):
        raise InputError("image.npy: is gone")

    monkeypatch.setattr(CachedCase, "image", vanish)
    with pytest.raises(InputError) as caught:
        list(iterate_batches(make_dataset(0), 0, 2, 1, pin_memory=False))
    assert str(caught.value) == "image.npy: is gone"


def test_a_file_named_stop_ends_the_loop(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    _, steps = start(stop=StopFlag(tmp_path / "run"))
    assert steps == 1


def test_validation_and_mirror_are_called_with_every_checkpoint(start, tmp_path):
    seen = []
    start(
        validate=lambda: {"val/dice": 0.5},
        on_checkpoint=lambda: seen.append(read_checkpoint(tmp_path / "run")["step"]),
    )
    assert seen == [4, 8]
    validated = [
        step for _, step, metrics in read_journal(tmp_path / "run") if "val/dice" in metrics
    ]
    assert validated == [4, 8]


def test_validation_changes_no_bit_of_the_training(start, whole, tmp_path):
    def validate():
        torch.manual_seed(123)
        np.random.seed(1)
        return {"val/dice": 0.0}

    start(validate=validate)
    assert_same(
        read_checkpoint(tmp_path / "run")["objective"],
        read_checkpoint(whole)["objective"],
    )


def test_the_journal_names_its_metrics_as_the_design_does(whole):
    for _, _, metrics in read_journal(whole):
        assert all(name.startswith(("losses/", "monitors/")) for name in metrics)
        assert {
            "losses/total",
            "losses/supervised",
            "monitors/lr",
            "monitors/coverage/organ",
        } <= set(metrics)
        terms = [v for k, v in metrics.items() if k.startswith("losses/") and k != "losses/total"]
        assert metrics["losses/total"] == pytest.approx(sum(terms), rel=1e-5)


def test_training_lowers_the_loss_on_labels_alone(start, tmp_path, tiny_config, tiny_plan):
    section = tiny_config.train.model_copy(update={"lr": 0.01, "log_every": 8})
    start(
        round_index=0,
        config=tiny_config.model_copy(update={"train": section}),
        plan=tiny_plan.model_copy(update={"steps": 24}),
    )
    losses = [m["losses/total"] for _, _, m in read_journal(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]


def test_the_learning_rate_rises_then_falls_to_zero(tiny_config):
    rates = [find_lr(tiny_config, step, 1000) for step in range(1000)]
    top = int(np.argmax(rates))
    assert top == round(tiny_config.train.warmup * 1000) - 1
    assert all(np.diff(rates[:top]) > 0)
    assert all(np.diff(rates[top:]) < 0)
    assert rates[0] == pytest.approx(tiny_config.train.lr / 30)
    assert 0 < rates[-1] < 0.01 * tiny_config.train.lr
    assert max(rates) <= tiny_config.train.lr


def test_waiting_for_data_is_told_once(capsys):
    progress = Progress(1, 0, 10)
    metrics = {"losses/total": 1.0, "monitors/steps_per_second": 1.0, "monitors/data_wait": 0.5}
    progress.report(1, metrics)
    progress.report(2, metrics)
    captured = capsys.readouterr()
    assert captured.err.count("waiting for data") == 1
    assert "step 2/10" in captured.out


def test_a_checkpoint_of_version_0_1_0_is_still_one_of_its_run(tiny_config, tiny_plan):
    known = tiny_plan.model_dump(mode="json")
    for key in ("estimate", "reasons", "device", "threads", "workers", "palette"):
        known.pop(key)
    then = hash_json([hash_config(tiny_config), known, 1, 0])
    assert _identify(tiny_config, tiny_plan, 1, 0) == then
    colored = tiny_plan.model_copy(update={"palette": {1: (255, 0, 0)}})
    assert _identify(tiny_config, colored, 1, 0) != then
