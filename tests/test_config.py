import contextlib
import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from medssl.config import Config, InputError
from medssl.data.layouts import read_dataset
from medssl.settings import (
    SHORTCUTS,
    dump,
    find_configs,
    hash_config,
    list_methods,
    load_config,
    render,
)

FULL = Path(__file__).with_name("full.yaml")


def write(folder, text, name="some.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def refuse(first=None, overrides=()):
    with pytest.raises(InputError) as caught:
        load_config(first, overrides)
    return str(caught.value)


def test_defaults_are_a_valid_configuration():
    config = load_config().config
    assert config.method == "default"
    assert config == load_config(overrides=["method=default"]).config


@pytest.mark.parametrize("method", list_methods())
def test_every_preset_resolves_and_begins_with_a_sentence_about_itself(method):
    resolved = load_config(overrides=[f"method={method}"])
    assert resolved.config.method == method
    first = list_methods()[method].read_text().splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith(".")


@pytest.mark.parametrize("path", sorted(find_configs().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_that_comes_along_resolves(path):
    assert load_config(path, ["data.root=somewhere"]).config.data.root is not None


@pytest.mark.parametrize(
    ("name", "normalization", "channels"),
    [("ct", "ct", 1), ("mr", "zscore", 1), ("mr_channels", "zscore", 4), ("pet_ct", "auto", 2)],
)
def test_the_configurations_of_modalities_read_what_they_show(
    tmp_path, name, normalization, channels
):
    path = find_configs() / f"{name}.yaml"
    (images := tmp_path / "images").mkdir()
    (labels := tmp_path / "labels").mkdir()
    for case_id in ("P01", "P02"):
        (labels / f"{case_id}.nii.gz").touch()
        for index in range(channels):
            ending = f"_{index:04d}" if channels > 1 else ""
            (images / f"{case_id}{ending}.nii.gz").touch()
    config = load_config(path, [f"data.root={tmp_path}"]).config
    dataset = read_dataset(tmp_path, config.data.format, config.data.labels)
    assert config.plan.normalization == normalization
    assert [len(case.images) for case in dataset.cases] == [channels] * 2
    assert dataset.labels == {0: "background", **(config.data.labels or {})}


def test_the_list_that_the_configuration_for_pet_and_ct_shows_names_its_channels(tmp_path):
    text = (find_configs() / "pet_ct.yaml").read_text()
    assert '{"channels": ["CT", "PET"], "cases": [{"case_id": "P01",' in text
    case = {"case_id": "P01", "image": "a.nii.gz", "image_1": "b.nii.gz"}
    for name in ("a.nii.gz", "b.nii.gz"):
        (tmp_path / name).touch()
    (tmp_path / "cases.json").write_text(json.dumps({"channels": ["CT", "PET"], "cases": [case]}))
    assert read_dataset(tmp_path / "cases.json", "auto", {1: "lesion"}).channels == ("CT", "PET")


def test_the_command_line_wins_over_the_yaml_and_the_yaml_over_the_preset(tmp_path):
    preset = write(tmp_path, "train: {lr: 0.5, rounds: 7, batch: 3}", "preset.yaml")
    path = write(tmp_path, f"method: {preset}\ntrain: {{lr: 0.25, rounds: 6}}")
    resolved = load_config(path, ["train.lr=0.125"])
    train = resolved.config.train
    assert (train.lr, train.rounds, train.batch) == (0.125, 6, 3)
    assert resolved.sources["train.lr"] == "command line"
    assert resolved.sources["train.rounds"] == str(path)
    assert resolved.sources["train.batch"] == f"method {preset}"
    assert resolved.sources["train.seed"] == "default"


def test_the_plan_replaces_what_is_auto_and_nothing_else():
    plan = {"train.steps": 77, "train.batch": 4, "plan.patch_size": [8, 8, 8]}
    resolved = load_config(overrides=["train.batch=3"], plan=plan)
    assert resolved.config.train.steps == 77
    assert resolved.config.train.batch == 3
    assert resolved.config.plan.patch_size == (8, 8, 8)
    assert resolved.sources["train.steps"] == "plan"
    assert resolved.sources["train.batch"] == "command line"


def test_a_folder_as_first_argument_is_the_data(tmp_path):
    resolved = load_config(tmp_path)
    assert resolved.config.data.root == tmp_path
    assert resolved.sources["data.root"] == "command line"


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_a_shortcut_sets_its_key(shortcut):
    value = "cuda:1" if shortcut == "device" else 3
    config = load_config(overrides=[f"{shortcut}={value}"]).config
    section, key = SHORTCUTS[shortcut].split(".")
    assert getattr(getattr(config, section), key) == value


def test_class_names_may_be_given_in_a_yaml_and_on_the_command_line(tmp_path):
    path = write(tmp_path, "data: {labels: {1: liver}}")
    config = load_config(path, ["data.labels.7=tumor"]).config
    assert config.data.labels == {1: "liver", 7: "tumor"}


def test_all_mistakes_are_reported_at_once_with_the_nearest_key(tmp_path):
    path = write(tmp_path, "trane: {lr: 1}\nnetwork: {widht: 2.0}")
    message = refuse(path, ["train.lr=-1", "method=defualt", "nonsense"])
    assert message.startswith("5 mistakes")
    assert "did you mean network.width" in message
    assert "did you mean default" in message
    assert "train.lr" in message
    assert "(got -1)" in message
    assert "'nonsense': expected key=value" in message
    assert "trane" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("filter.threshold.name=flax", "'curriculum', 'flex', 'free', 'soft' or 'quantile'"),
        ("network.dropout=1.5", "less than 1"),
        ("train.lr=abc", "(got 'abc')"),
        ("data.labeled=0", "(got 0)"),
        ("train.foreground=2", "less than or equal to 1"),
        ("dropout=0.3", "did you mean network.dropout"),
        ("train={lr: 1, lr: 2}", "stands twice"),
        ("train.lr=[1", "cannot be read as a value"),
        ("train.lr.x=1", "train.lr"),
        ("network.dropout=0", "filter.uncertainty.source=none"),
        ("plan.spacing=[0,1,1]", "greater than 0"),
        ("losses.entropy.ramp.start=0.7", "lies behind end="),
        ("noise.dropout=0", "needs noise.dropout above 0"),
        ("data.labels.liver=1", "data.labels.1=liver"),
        ("data.labels={255:liver}", "{1: liver}"),
        ("batch_size=4", "did you mean train.batch?"),
        ("num-workers=4", "did you mean train.workers?"),
        ("labels.1=liver", "did you mean data.labels.1?"),
        ("plan.patch_size=16", "should be a list, such as [1, 2] (got 16)"),
        ("train.lr=.inf", "finite number"),
        ("losses.entropy.order=.nan", "greater than or equal to 0"),
        ("data.labeled=true", "not yes or no"),
        ("losses.pseudo_label.options={q: true}", "not yes or no"),
        ("name.x=3", "`medssl config` lists all keys"),
        ("train.steps=[yes, 10]", "not yes or no"),
        ("target.temperature=0.5", "target.transport.epsilon sharpens"),
        ("losses.pseudo_label.weight=0", "set noise.mixing=none or cutmix"),
        ("teacher.source=[]", "teacher.source is empty"),
        ("losses.entropy.order=0", "teaches nothing"),
        ("data.labels={-1: lesion, 1: organ}", "data.ignore=-1"),
        ("teacher.source=[previous_round]", "losses.consistency.weight=0"),
        ("teacher.source=[ema]", "set target.transport.prior=labeled"),
    ],
)
def test_a_mistake_names_the_key_the_value_and_the_repair(override, words):
    message = refuse(overrides=[f"method={FULL}", override])
    assert words in message
    assert override.split("=")[0].split(".")[-1] in message


def test_a_temperature_of_hard_targets_is_refused():
    assert "target.kind=soft" in refuse(overrides=["method=fixmatch", "target.temperature=0.5"])


def test_the_share_that_quantile_keeps_grows_unless_it_is_given():
    def read(*settings):
        section = load_config(overrides=["filter.threshold.name=quantile", *settings]).config
        return section.filter.threshold.start, section.filter.threshold.end

    assert read() == (0.8, 0.95)
    falling = refuse(overrides=["method=curriculum", "filter.threshold.name=quantile"])
    assert "{name: quantile, start: 0.8, end: 0.95}" in falling
    assert read("filter.threshold.start=0.5") == (0.5, 0.95)


@pytest.mark.parametrize(
    "text", ["- 1\n- 2", "a: b: c", "a: {{ b }}", "\x00", "a: 1\na: 2", "just words"]
)
def test_what_is_no_configuration_is_an_error_that_names_the_file(tmp_path, text):
    path = write(tmp_path, text)
    assert str(path) in refuse(path)


def test_a_duplicate_key_is_refused_with_its_line(tmp_path):
    message = refuse(write(tmp_path, "train:\n  lr: 1\n  lr: 2\n"))
    assert "'lr' stands twice" in message
    assert "line 3" in message


def test_an_empty_yaml_is_the_default_configuration(tmp_path):
    assert load_config(write(tmp_path, "# nothing\n")).config == load_config().config


def test_a_missing_file_names_one_with_a_similar_name(tmp_path):
    write(tmp_path, "", "hippocampus.yaml")
    assert "did you mean" in refuse(tmp_path / "hipocampus.yaml")


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValidationError):
        Config().method = "other"


def test_a_dump_written_as_yaml_loads_as_the_same_configuration(tmp_path):
    overrides = ["data.labels={1: a, 5: b}", "train.lr=0.01", "plan.spacing=[1, 1, 2.5]"]
    config = load_config(tmp_path, overrides).config
    path = write(tmp_path, yaml.safe_dump(dump(config)))
    assert load_config(path).config == config
    assert json.loads(json.dumps(dump(config))) == dump(config)


def test_render_shows_every_key_with_its_source(tmp_path):
    text = render(load_config(tmp_path, ["train.lr=0.5"]))
    assert "train.lr: 0.5" in text
    (line,) = [line for line in text.splitlines() if line.startswith("train.lr:")]
    assert line.endswith("# command line")
    assert "losses.entropy.ramp.end: 0.25" in text


def test_render_leaves_out_what_nobody_gave(tmp_path):
    resolved = load_config(tmp_path, ["train.lr=0.5"], plan={"train.steps": 7})
    lines = render(resolved, only_given=True).splitlines()
    assert [line.split(":")[0] for line in lines] == ["data.root", "train.lr"]
    assert render(load_config(), only_given=True) == ""


@pytest.mark.parametrize("name", ["default.yaml", "methods.yaml", "plan.yaml"])
def test_render_tells_a_file_from_a_default_whatever_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "seed: 3", name)
    assert render(load_config(name), only_given=True).startswith("train.seed: 3")


def test_what_render_prints_is_the_same_configuration_again(tmp_path):
    names = ", ".join(f"{value}: 'structure number {value}, höher'" for value in range(1, 60))
    given = [f"data.labels={{{names}}}", "train.steps=[" + "1000, " * 20 + "7]", "seed=3"]
    resolved = load_config(tmp_path, given)
    text = render(resolved)
    assert all("  # " in line for line in text.splitlines()), "a value on several lines"
    assert load_config(write(tmp_path, text)).config == resolved.config


@pytest.mark.parametrize(
    "override",
    [
        "device=cuda",
        "train.workers=3",
        "train.log_every=7",
        "train.checkpoint_every=9",
        "tracking.uri=none",
    ],
)
def test_the_hash_leaves_out_what_does_not_decide_the_result(override):
    assert hash_config(load_config(overrides=[override]).config) == hash_config(
        load_config().config
    )


@pytest.mark.parametrize(
    "override", ["train.lr=0.5", "seed=1", "noise.strong=0.7", "labeled=4", "train.rounds=1"]
)
def test_the_hash_changes_with_what_decides_the_result(override):
    assert hash_config(load_config(overrides=[override]).config) != hash_config(
        load_config().config
    )


BILLION = "a: &a [x, x, x, x]\n" + "".join(
    f"{here}: &{here} [*{before}, *{before}, *{before}]\n"
    for before, here in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
HOSTILE = {
    "anchors": (BILLION, "write the value out"),
    "itself": ("a: &a [*a]", "write the value out"),
    "brackets": ("a: " + "[" * 3000, "nested"),
    "braces": ("a: " + "{a: " * 3000, "nested"),
    "tag": ("train: {lr: !!int x}", "tags such as"),
    "object": ("a: !!python/object/apply:os.system [ls]", "tags such as"),
    "merge": ("train: {<<: {lr: 1}}", "merge"),
    "null": ('data: {root: "a\\0b"}', "null character"),
    "tab": ("train:\n\tlr: 1", "cannot start any token"),
    "text": ("tracking: {experiment: " + "x" * 10**6 + "}", "bytes are no configuration"),
    "name": ("tracking: {experiment: " + "x" * 10**4 + "}", "at most 1000 characters"),
    "keys": ("".join(f"k{place}: 1\n" for place in range(3000)), "3000 mistakes"),
    "long key": ("a." * 400 + "b: 1", "unknown key"),
    "twice": ("rounds: 1\ntrain: {rounds: 2}", "train.rounds: stands twice"),
    "dotted": ("train.lr: 1\ntrain: {lr: 2}", "train.lr: stands twice"),
    "value twice": ("data: {labels: {1: a, '1': b}}", "a label value twice"),
    "number": ("5", "got int"),
    "documents": ("train: {lr: 1}\n---\ntrain: {lr: 2}", "another document"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_yaml_is_refused_at_once_by_a_short_sentence(tmp_path, name):
    text, words = HOSTILE[name]
    started = time.perf_counter()
    message = refuse(write(tmp_path, text))
    assert words in message
    assert len(message) < 3000
    assert time.perf_counter() - started < 5.0


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_yaml_of_another_encoding_is_refused(tmp_path, encoding):
    path = tmp_path / "some.yaml"
    path.write_bytes("data: {root: é}".encode(encoding))
    assert "not UTF-8" in refuse(path)


@pytest.mark.parametrize("text", ["\ufefftrain: {lr: 0.5}", "train:\r\n  lr: 0.5\r\n"])
def test_a_yaml_of_another_editor_is_read(tmp_path, text):
    path = tmp_path / "some.yaml"
    path.write_bytes(text.encode())
    assert load_config(path).config.train.lr == 0.5


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("tracking.experiment=2026-02-30", "tracking.experiment", "2026-02-30"),
        ("tracking.experiment=2026-11-29", "tracking.experiment", "2026-11-29"),
        ("tracking.experiment=1:30", "tracking.experiment", "1:30"),
        ("steps=010", "train.steps", 10),
        ("steps=1e3", "train.steps", 1000),
        ("losses.pseudo_label.options={q: 1e-1}", "losses.pseudo_label.options", {"q": 0.1}),
    ],
)
def test_a_value_is_what_it_looks_like(override, key, value):
    found = load_config(overrides=[override]).config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps=1:30", "valid integer"),
        ("steps=" + "9" * 30, "less than or equal to"),
        ("steps=" + "9" * 5000, "a number of 5000 digits"),
        ("seed=" + "9" * 30, "less than or equal to"),
        ("rounds=1000", "less than or equal to 20"),
        ("train.workers=1000000", "less than or equal to 128"),
        ("train.batch=100000000", "less than or equal to 65536"),
        ("train.unlabeled_ratio=1e9", "less than or equal to 1000"),
        ("plan.patch_size=[999999, 8, 8]", "less than or equal to 8192"),
        ("plan.spacing=[1e300, 1, 1]", "less than or equal to 1000"),
        ("train.lr=1e400", "finite number"),
        ("data.ignore=99999999999", "less than or equal to"),
        ("data.labels={99999999999: a}", "no label file holds"),
        ("data.labels={1: ' '}", "has no letters"),
        ("plan.flips=[0, 0]", "names 0 twice"),
        ("views=[strong, strong]", "names strong twice"),
        ("teacher.source=[ema, ema]", "names ema twice"),
        ("train.lr=", "a value is missing"),
        ("a.b=", "a value is missing"),
        ("=x", "expected key=value"),
        ("train..lr=1", "did you mean"),
        (".train=1", "unknown key"),
        ("train.=1", "unknown key"),
        ("a." * 400 + "b=1", "unknown key"),
        ("train.lr=" + "x" * 10**6, "too long"),
        ("train.lr=" + "[" * 3000, "nested"),
        ("train.lr=*a", "write the value out"),
        ("plan.normalization=CT", "did you mean ct?"),
        ("network.name=DynUNet", "did you mean dynunet?"),
        ("filter.threshold.name=Flex", "did you mean flex?"),
        ("views=[Strong]", "did you mean strong?"),
        ("train.batch=AUTO", "did you mean auto?"),
        ("data.labeled=All", "did you mean all?"),
    ],
)
def test_a_value_beyond_bounds_is_refused_by_a_short_sentence(override, words):
    message = refuse(overrides=[override])
    assert words in message
    assert len(message) < 1000


def test_a_preset_of_your_own_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "rounds: 1", "mine.yaml")
    config = write(tmp_path, "method: ~/mine.yaml", "config.yaml")
    assert load_config(config).config.train.rounds == 1


def test_a_preset_of_your_own_may_use_shortcuts_and_builds_on_no_other(tmp_path):
    preset = write(tmp_path, "rounds: 1\nsteps: [7, 5]", "mine.yaml")
    resolved = load_config(overrides=[f"method={preset}"])
    assert resolved.config.train.rounds == 1
    assert resolved.sources["train.steps"] == f"method {preset}"
    assert load_config(overrides=[f"method={preset}", "rounds=2"]).config.train.rounds == 2
    other = write(tmp_path, "method: fixmatch", "other.yaml")
    assert "builds on no other one" in refuse(overrides=[f"method={other}"])


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)


@given(st.lists(st.one_of(words, st.tuples(words, words).map("=".join)), max_size=4))
@settings(max_examples=20)
def test_no_argument_ends_in_a_traceback(overrides):
    with contextlib.suppress(InputError):
        assert isinstance(load_config(None, overrides).config, Config)


def test_the_configuration_needs_neither_torch_nor_monai():
    code = "import sys, medssl.settings; assert not {'torch', 'monai', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("key", ["losses.entropy.order", "target.transport.rho"])
def test_limits_of_a_formula_may_be_infinite(key):
    section, _, name = key.rpartition(".")
    config = load_config(overrides=[f"method={FULL}", f"{key}=.inf"]).config
    for part in section.split("."):
        config = getattr(config, part)
    assert getattr(config, name) == float("inf")


def test_runs_of_the_first_version_go_on_as_classic():
    first = "e6cc0c81e778308a4b5c8e05aed0f95bc81cc79358b7c76b2f8315510a5c8d3b"  # its default
    assert hash_config(load_config(overrides=["method=classic"]).config) == first
    assert hash_config(load_config().config) != first
    changed = load_config(overrides=["method=classic", "train.student_lr=1e-3"]).config
    assert hash_config(changed) != first


HASHES = {
    "bcp": "9add8179e4cd",
    "classic": "e6cc0c81e778",
    "cross_pseudo": "17fd5c9a8357",
    "curriculum": "866412b781d9",
    "cutmix": "d6462045bdef",
    "default": "096e2b29ca77",
    "ensemble": "6759109f41ed",
    "entropy": "d80132a8cc6e",
    "fixmatch": "64bbe4ce4d9a",
    "flexmatch": "5a8aa501839a",
    "freematch": "484deaea2e5d",
    "labels_only": "8efe1c2bae52",
    "mean_teacher": "a23b1dc94f72",
    "noisy_student": "de19d32c158e",
    "otamatch": "170260b13dc6",
    "pseudo_label": "e39ad64382c7",
    "robust": "4003253b3fb7",
    "softmatch": "7306fa36b2d2",
    "st_plus_plus": "a4a575742363",
    "uamt": "30956bab7d38",
    "unimatch": "d1a54af9e06d",
}
"""Beginnings of the hashes of the presets, which runs that have been begun have on record."""


@pytest.mark.parametrize("method", list_methods())
def test_a_run_that_was_begun_with_a_preset_goes_on(method, tmp_path):
    config = load_config(overrides=[f"method={method}"]).config
    assert hash_config(config).startswith(HASHES[method])
    recorded = load_config(write(tmp_path, yaml.safe_dump(dump(config)), "config.yaml")).config
    assert recorded == config


def test_students_of_the_recipe_learn_from_labels_as_round_0_does():
    recipe, other = (
        load_config(overrides=given).config for given in ([], ["losses.supervised.name=ce"])
    )
    assert recipe.losses.supervised.beside_pseudo_labels == "dice_ce"
    assert other.losses.supervised.beside_pseudo_labels == "ce"
    pinned = load_config(overrides=["losses.supervised.student=dice_ce"]).config
    assert hash_config(pinned) == hash_config(recipe)  # as runs that were begun have on record
    assert len({hash_config(config) for config in (recipe, other)}) == 2
    split = load_config(overrides=["losses.supervised={name: ce, student: dice_ce}"]).config
    assert hash_config(split) != hash_config(other)


@pytest.mark.parametrize("method", list_methods())
def test_a_preset_says_only_how_it_differs_from_the_defaults(method):
    defaults = dump(Config())
    for key, value in walk(yaml.safe_load(list_methods()[method].read_text())):
        default = functools.reduce(lambda section, name: section[name], key, defaults)
        # A range of thresholds is said where it is the paper's, so that quantile does not take it.
        assert value != default or key[:2] == ("filter", "threshold"), ".".join(key)


def walk(tree, prefix=()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from walk(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def test_the_defaults_are_the_recipe_but_for_what_its_preset_says():
    said = {key for key, _ in walk(yaml.safe_load(list_methods()["default"].read_text()))}
    recipe, defaults = (dict(walk(dump(config))) for config in (load_config().config, Config()))
    assert {key for key in defaults if recipe[key] != defaults[key]} == said
    assert len(said) <= 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["filter.uncertainty.source=none"], "teacher.probs=clean"),
        (["teacher.probs=clean", "filter.threshold.name=none", "filter.uncertainty.start=null"],
         "no voxel is refused"),
        (["filter.uncertainty.fidelity=fast"], "fidelity=fast shares the encoder among passes"),
        (["teacher.probs=clean", "filter.uncertainty={source: none, fidelity: fast}"],
         "fidelity=fast shares the encoder among passes"),
        (["teacher.probs=clean", "filter.uncertainty={start: null, fidelity: fast}"],
         "set filter.uncertainty.fidelity=full"),
    ],
)  # fmt: skip
def test_parts_of_the_recipe_that_need_each_other_are_named(settings, words):
    assert words in refuse(overrides=settings)
