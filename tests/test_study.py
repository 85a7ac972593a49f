"""What `scripts/study.py` does with its CSV; the trainings are stood in for."""

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from medssl import metrics
from medssl.config import InputError
from medssl.report.sentences import EVIDENCE
from medssl.runs import hold_lock, write_json
from medssl.settings import hash_config, load_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import study

    return study


@pytest.fixture
def trained(study, monkeypatch, tiny_plan):
    """The settings of every training that a study asks for; each gives Dice of its own."""
    commands = []

    def finish(data, folder, settings, options=()):
        commands.append((folder.name, list(settings), list(options)))
        write_json(folder / "plan.json", tiny_plan.model_dump(mode="json"))
        write_json(folder / "provenance.json", {"revision": "0123456789abcdef"})
        weights = folder / "round_0" / "model" / "weights.safetensors"
        weights.parent.mkdir(parents=True, exist_ok=True)
        weights.write_text(f"the start of {[s for s in settings if 'draw=' in s]}")
        for place, dice in (("evaluation", 0.6), ("evaluation/round_1", 0.55)):
            path = folder / place / "per_case.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            bonus = 0.1 if "recipe" in folder.name else 0.0
            rows = [f"c{i},p{i},{dice + bonus + 0.01 * i}" for i in range(3)]
            path.write_text("\n".join(["case_id,patient_id,dice", *rows]) + "\n")
        steps = [int(s[6:]) for s in settings if s.startswith("steps=") and s[6:].isdigit()] or [5]
        rounds = [{"round": index, "steps": steps[0], "seconds": 45.0} for index in range(3)]
        return {"rounds": rounds[: 1 if "rounds=0" in settings else 3]}

    monkeypatch.setattr(study, "finish_run", finish)
    monkeypatch.setattr(metrics, "NUM_RESAMPLES", 100)  # all cases of a draw differ alike
    return commands


def make_study(study, tmp_path, *settings):
    return study.Study("DATA", settings, tmp_path / "docs" / "s.csv", tmp_path / "work", 7000)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_tasks_of_an_array_have_draws_of_their_own(study, trained, tmp_path, monkeypatch):
    options = ["study.py", "DATA", "--csv", str(tmp_path / "s.csv"), "--draws", "0,1,2"]
    monkeypatch.setattr(
        "sys.argv", [*options, "--arms", "round_0", "--out", str(tmp_path / "runs")]
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    for place, draws in (("1", {"1"}), ("0", {"0", "1", "2"})):
        monkeypatch.setenv("RANK", place)
        study.main()
        assert {row["draw"] for row in read(tmp_path / "s.csv")} == draws


@pytest.mark.parametrize(("tasks", "draws_each"), [(1, 3), (3, 1), (6, 1), (12, 1)])
def test_arms_of_all_draws_are_dealt_and_tasks_in_step_with_the_draws_have_one_each(
    study, monkeypatch, tasks, draws_each
):
    arms = ["round_0", "labels", "shadow", "recipe"]
    monkeypatch.setenv("WORLD_SIZE", str(tasks))
    dealt = []
    for place in range(tasks):
        monkeypatch.setenv("RANK", str(place))
        dealt.append(study.deal_arms([0, 1, 2], arms))
        assert len({draw for draw, _ in dealt[-1]}) == draws_each
        assert dealt[-1] == sorted(dealt[-1], key=lambda pair: (pair[0], arms.index(pair[1])))
    pairs = [pair for task in dealt for pair in task]
    assert sorted(pairs) == sorted((draw, arm) for draw in (0, 1, 2) for arm in arms)


def test_round_0_of_a_draw_is_not_trained_by_two_tasks_at_once(
    study, trained, tmp_path, monkeypatch
):
    finish, busy = study.finish_run, []

    def finish_alone(data, folder, settings, options=()):
        if folder.name == "draw_0_round_0":
            lock = hold_lock(folder.with_suffix(".lock"), busy="held")
            with pytest.raises(InputError, match="held"), lock:
                pass
            busy.append(folder)
        return finish(data, folder, settings, options)

    monkeypatch.setattr(study, "finish_run", finish_alone)
    study.run_arm(make_study(study, tmp_path, "labeled=6"), 0, "recipe")
    assert len(busy) == 1


def test_rows_that_two_tasks_have_stand_once(study, trained, tmp_path, monkeypatch):
    run = make_study(study, tmp_path, "labeled=6")
    study.run_arm(run, 0, "recipe")
    monkeypatch.setattr(study, "is_finished", lambda *_: False)  # as it was when the task began
    for arm in ("first_round", "shadow"):
        study.run_arm(run, 0, arm)
    rows = [(row["arm"], row["case_id"]) for row in read(run.csv)]
    assert len(rows) == len(set(rows)) == 5 * 3


def test_what_a_study_runs_is_not_dealt_again(study, monkeypatch):
    calls = []
    done = SimpleNamespace(returncode=0)
    monkeypatch.setattr(study.subprocess, "run", lambda *_, **how: calls.append(how) or done)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    study.run_command("evaluate", "runs/a")
    assert not {"RANK", "WORLD_SIZE"} & calls[0]["env"].keys()


def test_an_arm_of_the_csv_is_never_run_again_on_whatever_machine(study, trained, tmp_path):
    first = make_study(study, tmp_path, "labeled=6")
    study.run_arm(first, 0, "recipe")
    count = len(trained)
    study.run_arm(make_study(study, tmp_path, "labeled=6"), 0, "recipe")
    elsewhere = study.Study("OTHER", ("labeled=6",), first.csv, tmp_path / "other", 7000)
    study.run_arm(elsewhere, 0, "recipe")
    assert len(trained) == count
    study.run_arm(elsewhere, 1, "recipe")
    assert len(trained) > count
    rows = read(first.csv)
    assert {(row["draw"], row["arm"]) for row in rows} == {
        (draw, arm) for draw in "01" for arm in ("round_0", "recipe", "first_round")
    }
    assert len(rows) == 6 * 3


def test_arms_of_a_draw_share_its_round_0(study, trained, tmp_path):
    run = make_study(study, tmp_path, "labeled=6")
    for arm in ("round_0", "shadow", "no_entropy"):
        study.run_arm(run, 2, arm)
    by_name = {name: (settings, options) for name, settings, options in trained}
    assert by_name["draw_2_round_0"][0] == ["labeled=6", "draw=2", "rounds=0"]
    for name in ("draw_2_shadow", "draw_2_no_entropy"):
        assert by_name[name][1] == ["--round-0", str(tmp_path / "work" / "draw_2_round_0")]
    assert "losses.pseudo_label.weight=0" in by_name["draw_2_shadow"][0]
    assert by_name["draw_2_no_entropy"][0][-3:] == [
        *("losses.entropy.weight=0", "rounds=1", "steps=[8, 8]")
    ]


def test_first_students_are_compared_with_each_other(study, trained, tmp_path):
    run = make_study(study, tmp_path, "labeled=6")
    for arm in ("shadow", "recipe", "recipe"):
        study.run_arm(run, 0, arm)
    rows = {row["arm"]: row for row in study.tabulate_arms(run.csv)}
    assert list(rows) == ["round_0", "shadow_first_round", "shadow", "first_round", "recipe"]
    assert rows["first_round"]["minus shadow"].startswith("+0.1000")  # 0.65 and 0.55
    assert rows["recipe"]["minus shadow"].startswith("+0.1000")  # 0.7 and 0.6
    assert len(read(run.csv)) == 5 * 3


def test_labels_alone_have_as_many_passes_as_the_recipe(study, trained, tmp_path):
    run = make_study(study, tmp_path, "steps=[100,30]", "rounds=2")
    study.run_arm(run, 0, "labels")
    # by hand, of the tiny plan: 2 patches a step; a student's has 2 + 2 (1 + 2 passes / 3)
    passes = 100 * 2 + 2 * 30 * (2 + 2 * (1 + 2 / 3))
    assert trained[-1][1][-1] == f"steps={round(passes / 2)}"
    study.run_arm(run, 1, "labels")  # the plan is known, so they wait for no round 0
    assert [call[0] for call in trained] == ["draw_0_round_0", "draw_0_labels", "draw_1_labels"]


def test_what_a_part_saves_of_passes_goes_into_longer_students(study, trained, tmp_path):
    run = make_study(study, tmp_path, "steps=[100,30]")
    for arm, longer in (("no_mc_dropout", "[100, 34]"), ("no_second_round", "[100, 60]")):
        study.run_arm(run, 0, arm)
        assert trained[-1][1][-1] == f"steps={longer}"  # 30 (2 + 2 * 5 / 3) / (2 + 2 * 4 / 3)


def test_a_lever_has_the_passes_of_the_first_student(study, trained, tmp_path):
    run = make_study(study, tmp_path, "steps=[100,30]")
    for arm in ("first_round", "two_unlabeled"):
        study.run_arm(run, 0, arm)
    settings = [command[1] for command in trained]
    assert settings[1] == ["steps=[100,30]", "draw=0", "rounds=1"]
    # by hand, of the tiny plan: 30 (2 + 2 * 5 / 3) / (2 + 4 * 5 / 3)
    assert settings[-1][-3:] == ["train.unlabeled_ratio=2", "rounds=1", "steps=[100, 18]"]
    rows = {row["arm"]: row for row in study.tabulate_arms(run.csv)}
    assert list(rows) == ["round_0", "first_round", "two_unlabeled"]


PASSES = 100 * 2 + 2 * 30 * (2 + 2 * (1 + 2 / 3))  # of the whole recipe, by hand
SHARED = 100 * 2  # of round 0


@pytest.mark.parametrize(
    ("method", "passes"),  # of a step, and all that its students have
    [
        ("fixmatch", (2 + 2 * (1 + 1 / 3), PASSES)),
        ("unimatch", (2 + 2 * (3 + 1 / 3), PASSES)),
        ("uamt", (2 + 2 * (1 + 5 / 3), PASSES)),  # the target, and four passes for the filter
        ("cross_pseudo", (2 * (2 + 2 * (1 + 1 / 3)), PASSES)),
        ("bcp", (2 + 2 * (1 + 1 / 3), PASSES - SHARED)),  # goes on from round 0
        ("curriculum", (2 * (2 + 2), PASSES - SHARED)),  # in both rounds
        ("noisy_student", ((2 + 4) + (2 + 6), PASSES - SHARED)),
        ("classic", (2 * (2 + 2), PASSES - SHARED)),
    ],
)
def test_a_method_has_the_passes_of_the_recipe(study, trained, tmp_path, method, passes):
    run = make_study(study, tmp_path, "steps=[100,30]", "validation=0")
    study.run_arm(run, 0, method)
    _, settings, options = trained[-1]
    assert settings[-2] == f"method={method}"
    per_step, whole = passes
    steps = round(whole / per_step)
    rounds = 2 if method in ("curriculum", "noisy_student", "classic") else 1
    assert settings[-1] == f"steps={[100, *[steps] * rounds]}"
    own = method in ("bcp", "uamt", "classic")  # an average of their own, and so a round 0
    assert options == ([] if own else ["--round-0", str(tmp_path / "work" / "draw_0_round_0")])


def test_an_ensemble_pays_for_the_models_of_round_0_that_are_not_shared(study, trained, tmp_path):
    study.run_arm(make_study(study, tmp_path, "steps=[100,300]"), 0, "ensemble")
    whole = 2 * 300 * (2 + 2 * (1 + 2 / 3))
    assert trained[-1][1][-1] == f"steps={[100, round((whole - 2 * SHARED) / (2 + 2))]}"


def test_the_last_round_is_measured_and_the_first_student_up_to_its_end(study, trained, tmp_path):
    run = make_study(study, tmp_path, "labeled=6")
    for place, dice in (("round_1", 0.4), ("round_2", 0.3)):
        table = tmp_path / "work" / "draw_0_fixmatch" / "evaluation" / place / "per_case.csv"
        table.parent.mkdir(parents=True)
        table.write_text(f"case_id,patient_id,dice\nc0,p0,{dice}\n")
    for arm in ("recipe", "fixmatch"):
        study.run_arm(run, 0, arm)
    rows = {row["arm"]: row for row in read(run.csv)}
    assert float(rows["fixmatch"]["dice"]) == 0.3
    assert [rows[arm]["steps"] for arm in ("round_0", "first_round", "recipe")] == ["5", "10", "15"]
    assert [rows[arm]["minutes"] for arm in ("first_round", "recipe")] == ["1.5", "2.2"]


def test_rows_of_other_settings_are_not_added_to(study, trained, tmp_path):
    run = make_study(study, tmp_path, "labeled=6")
    study.run_arm(run, 0, "round_0")
    count = len(trained)
    other = make_study(study, tmp_path, "labeled=6", "teacher.ema_decay=0.99")
    for arm in ("round_0", "recipe"):
        with pytest.raises(InputError, match="other settings"):
            study.run_arm(other, 0, arm)
    before = run.csv.read_text()
    lines = before.replace("settings", "elsewhere").splitlines(keepends=True)
    run.csv.write_text("".join(lines))  # of a version that wrote none
    with pytest.raises(InputError, match="older version"):
        study.run_arm(run, 1, "round_0")
    assert len(trained) == count


def test_labels_alone_are_taken_from_the_study_of_an_earlier_recipe(study, trained, tmp_path):
    run = make_study(study, tmp_path, "labeled=6", "teacher.probs=clean")
    for arm in ("labels", "all", "recipe"):
        study.run_arm(run, 0, arm)
    later = replace(run, settings=("labeled=6",), csv=tmp_path / "l.csv", work=tmp_path / "later")
    longer = replace(later, controls=run.csv)
    trained.clear()
    with pytest.raises(InputError, match="other settings or steps"):  # its teacher has one pass
        study.run_arm(longer, 0, "labels")
    same = ("labeled=6", "teacher.probs=clean", "losses.entropy.weight=0.1")
    later = replace(later, settings=same, controls=run.csv)
    for arm in ("recipe", "labels", "all"):
        study.run_arm(later, 0, arm)
    assert {name for name, *_ in trained} == {"draw_0_round_0", "draw_0_recipe"}
    rows = [
        [row for row in read(path) if row["arm"] in ("labels", "all")]
        for path in (run.csv, later.csv)
    ]
    assert rows[0] == rows[1] != []
    study.run_arm(later, 1, "labels")
    assert trained[-1][0] == "draw_1_labels"


def test_an_arm_from_another_round_0_is_named(study, trained, tmp_path):
    run = make_study(study, tmp_path, "labeled=6")
    for arm in ("labels", "recipe", "no_entropy"):
        study.run_arm(run, 0, arm)
    lines = run.csv.read_text().splitlines()
    start = read(run.csv)[0]["round_0"]
    moved = [
        li.replace(start, "f" * 10) if "no_entropy" in li or "labels" in li else li for li in lines
    ]
    run.csv.write_text("\n".join(moved) + "\n")
    rows = {row["arm"]: row["minus round_0"] for row in study.tabulate_arms(run.csv)}
    assert rows["no_entropy"].endswith("; another start")
    assert "another" not in rows["recipe"] + rows["labels"]


def test_a_finished_run_is_held_against_its_settings_and_measured_where_cases_failed(
    study, monkeypatch, tmp_path
):
    calls = []
    monkeypatch.setattr(study, "run_command", lambda *words: calls.append(words[0]))
    write_json(tmp_path / "summary.json", {"rounds": []})
    for failed, expected in (([], ["train"]), (["c0"], ["train", "evaluate"])):
        write_json(tmp_path / "evaluation" / "summary.json", {"failed": failed})
        calls.clear()
        study.finish_run("DATA", tmp_path, ["labeled=6"])
        assert calls == expected


def test_each_csv_has_a_folder_of_runs(study):
    options = study.make_parser("What it does.").parse_args(["DATA", "--csv", "docs/acdc_7.csv"])
    assert study.read_study(options).work == Path("runs/acdc_7")


def test_parts_of_one_draw_count_in_the_adjustment(study, trained, tmp_path):
    run = make_study(study, tmp_path, "labeled=6")
    for draw, arms in (
        (0, ("first_round", "no_entropy", "no_cutmix")),
        (1, ("first_round", "no_entropy")),
    ):
        for arm in arms:
            study.run_arm(run, draw, arm)
    lines = run.csv.read_text().splitlines()
    lines = [li.replace("0.60000", "0.59000") if "1,no_entropy" in li[:12] else li for li in lines]
    run.csv.write_text("\n".join(lines) + "\n")
    arms, patients = study.read_arms(run.csv)
    alone, _ = study.compare_arms(arms["no_entropy"], arms["first_round"], patients)
    rows = {row["arm"]: row for row in study.tabulate_arms(run.csv)}
    assert rows["no_entropy"]["p (Holm)"] == f"{2 * alone['p']:.2g}"
    assert rows["no_cutmix"]["p (Holm)"] == ""


def test_the_control_is_one_that_has_draws_of_the_recipe(study):
    def make(dice, *draws):
        return {draw: {"c": {"dice": dice, "dice/a": dice}} for draw in draws}

    arms = {"recipe": make(0.8, 0, 1, 2), "labels": make(0.7, 0, 5), "shadow": make(0.6, 1, 2)}
    assert study.pick_better(arms)[0] == "shadow"  # no draw has both
    arms["shadow"] |= make(0.9, 5)
    assert study.pick_better(arms)[0] == "shadow"  # draw 5 is none of the recipe's
    arms["labels"] |= make(0.7, 1)
    assert study.pick_better(arms)[0] == "labels"
    assert study.pick_better({"recipe": make(0.8, 0), "labels": make(0.7, 1)}) is None


def test_students_from_scratch_have_the_steps_of_the_recipe_s(study, trained, tmp_path):
    study.run_arm(make_study(study, tmp_path, "labeled=6"), 0, "no_warm_start")
    assert trained[-1][1][-1] == "steps=[8, 8]"  # of the plan, which gives them more by itself


def test_all_labels_train_in_the_plateau(study, trained, tmp_path):
    study.run_arm(make_study(study, tmp_path, "labeled=6", "test=60"), 0, "all")
    assert trained[-1][1] == ["test=60", "validation=0", "rounds=0", "steps=7000"]


def test_the_table_has_differences_over_draws(study, trained, tmp_path):
    run = make_study(study, tmp_path, "labeled=6")
    for draw in (0, 1):
        for arm in ("labels", "recipe", "no_cutmix", "no_entropy", "no_second_round"):
            study.run_arm(run, draw, arm)
    rows = {row["arm"]: row for row in study.tabulate_arms(run.csv)}
    assert list(rows) == [
        *("round_0", "labels", "first_round", "recipe", "no_entropy", "no_cutmix"),
        "no_second_round",
    ]
    assert rows["recipe"]["dice"] == "0.7100"
    assert rows["recipe"]["minus labels"].startswith("+0.1000 [+0.1000, +0.1000]")
    assert rows["no_cutmix"]["minus recipe"].startswith("-0.0500")  # 0.6 and first_round's 0.65
    assert rows["no_second_round"]["minus recipe"].startswith("-0.1000")
    assert rows["first_round"]["minus recipe"].startswith("-0.0500")
    assert rows["labels"]["minus labels"] == ""
    assert study.pick_better(study.read_arms(run.csv)[0])[0] == "labels"
    study.run_arm(run, 2, "recipe")  # of which labels alone have nothing
    rows = {row["arm"]: row for row in study.tabulate_arms(run.csv)}
    assert rows["recipe"]["minus labels"].endswith("; draws 0, 1 alone")
    assert rows["labels"]["minus recipe"].count("alone") == 0


def test_tables_of_a_csv_that_is_missing_are_a_mistake(study, tmp_path, monkeypatch, capsys):
    path = tmp_path / "typo.csv"
    monkeypatch.setattr("sys.argv", ["study.py", "DATA", "--csv", str(path), "--table"])
    with pytest.raises(SystemExit, match="2"):
        study.main()
    assert capsys.readouterr().err.startswith(f"error: {path}: no such file")


def test_every_lever_is_another_configuration(study):
    recipe = load_config(None, ["rounds=1"]).config
    configs = [
        load_config(None, ["rounds=1", *changes]).config
        for name, changes in {**study.PARTS, **study.LEVERS}.items()
        if name != "no_second_round"
    ]
    assert recipe not in configs
    assert len({hash_config(config) for config in configs}) == len(configs)


def test_an_unknown_arm_is_named(study):
    with pytest.raises(study.argparse.ArgumentTypeError, match="no arm; there are round_0"):
        study.split_arms("labels,recipes")


@pytest.mark.slow
def test_report_and_readme_say_what_the_committed_study_found(study):
    path = ROOT / "docs" / "confirm_acdc_3.csv"
    arms, patients = study.read_arms(path)
    assert study.pick_better(arms)[0] == "labels"
    found, draws = study.compare_arms(arms["recipe"], arms["labels"], patients)
    shared = [draw for draw in arms["recipe"] if draw in arms["labels"]]
    assert f"in {('two', 'three', 'four', 'five')[draws - 2]} draws of them" in EVIDENCE
    after, before = (
        sum(study.average_dice(arms[arm][draw]) for draw in shared) / draws
        for arm in ("recipe", "labels")
    )
    words = f"at {after:.3f} Dice where labels alone, trained as long, are at {before:.3f}"
    assert words in EVIDENCE
    interval = f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
    by_t = f"[{found['t_low']:+.3f}, {found['t_high']:+.3f}]"
    assert f": {interval}, by Student's t {by_t}" in EVIDENCE
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"reaches {after:.3f} Dice" in readme
    assert f"reach {before:.3f}: {interval}, by Student's t {by_t}" in readme


def test_arms_are_compared_class_by_class_before_the_mean(study, tmp_path):
    path = tmp_path / "s.csv"
    lines = ["draw,arm,case_id,patient_id,dice/a,dice/b,dice"]
    for i in range(3):
        lines += [f"0,labels,c{i},p{i},0.90,0.0,0.45", f"0,shadow,c{i},p{i},0.44,,0.44"]
        lines += [f"0,recipe,c{i},p{i},0.90,0.9,0.90"]
    path.write_text("\n".join(lines) + "\n")
    arms, patients = study.read_arms(path)
    found, _ = study.compare_arms(arms["shadow"], arms["labels"], patients)
    assert found["mean"] == pytest.approx(0.27)
    assert study.pick_better(arms)[0] == "shadow"
    assert study.average_dice(arms["shadow"][0]) == pytest.approx(0.44)  # alone


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        (["method=default"], 2),
        (["method=classic"], 0),
        (["method=uamt"], 1 + 4),
        (["method=uamt", "filter.uncertainty.start=null", "filter.threshold.name=fixed"], 1),
        (["method=st_plus_plus"], 0),
    ],
)
def test_passes_of_an_online_teacher_are_those_that_a_step_makes(study, settings, passes):
    assert study.count_online_passes(load_config(overrides=settings).config) == passes
