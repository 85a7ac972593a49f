import time

import numpy as np
import pytest

from medssl.config import InputError
from medssl.networks.build import build_network
from medssl.rounds import estimate
from medssl.rounds.estimate import estimate_run, make_case, measure_step, measure_window
from medssl.settings import load_config

CLASSIC = ("method=classic", "network.dropout=0.1", "train.batch=2")


def configure(*settings):
    return load_config(overrides=[*settings, "tracking.uri=none"]).config


@pytest.fixture
def timed(monkeypatch):
    """A step of round 0 takes one second, of a student three, a window a tenth."""
    monkeypatch.setattr(estimate, "measure_step", lambda plan, config, index: 1.0 + 2.0 * index)
    monkeypatch.setattr(estimate, "measure_window", lambda plan: 0.1)


def count_hours(plan, rounds, *settings, **changes):
    plan = plan.model_copy(update={"steps": (3600, 1800), **changes})
    return estimate_run(plan, configure(*settings), rounds)["hours"]


def test_hours_count_every_step_of_every_round(timed, tiny_plan):
    assert count_hours(tiny_plan, 0) == 1.0
    assert count_hours(tiny_plan, 1) == pytest.approx(1 + 1.5)
    assert count_hours(tiny_plan, 2) == pytest.approx(1 + 2 * 1.5)
    larger = "train.unlabeled_ratio=[1, 3]"  # 4 patches, then 8
    assert count_hours(tiny_plan, 2, larger) == pytest.approx(1 + 1.5 + 2 * 1.5)


def test_hours_count_the_models_of_an_ensemble(timed, tiny_plan):
    ensemble = ("method=ensemble", "rounds=1")
    assert count_hours(tiny_plan, 1, *ensemble) == pytest.approx(3 * 1 + 1.5)


def test_hours_count_the_passes_of_pseudo_labels(timed, tiny_plan):
    windows = {"estimate": {"windows": 36000.0}}  # an hour a pass
    assert count_hours(tiny_plan, 0, **windows) == 1.0
    online = count_hours(tiny_plan, 2, "filter.uncertainty.passes=5", **windows)
    assert online == pytest.approx(1 + 3 + (1 + 1 + 5))
    flips = {"flips": (0,), **windows}
    offline = count_hours(tiny_plan, 1, "method=classic", **flips)
    assert offline == pytest.approx(1 + 1.5 + 2 * (2 + 8))


@pytest.mark.parametrize("method", ["default", "classic", "cross_pseudo", "unimatch"])
def test_a_step_of_a_student_is_tried_as_it_will_be(tiny_plan, method):
    config = configure(f"method={method}", "train.batch=2")
    assert 0 < measure_step(tiny_plan, config, 1) < 10


def test_a_step_costs_what_the_objective_costs(tiny_plan, monkeypatch):
    quick = measure_step(tiny_plan, configure(), 0)
    real = estimate.Objective.after_step

    def sleep(objective):
        time.sleep(0.2)
        real(objective)

    monkeypatch.setattr(estimate.Objective, "after_step", sleep)
    assert measure_step(tiny_plan, configure(), 0) > max(0.2, quick)


def test_a_step_that_another_program_held_up_does_not_count(tiny_plan, monkeypatch):
    monkeypatch.setattr(estimate, "TRIED_SECONDS", 0.5)
    quick = measure_step(tiny_plan, configure(), 0)
    real, count = estimate.Objective.after_step, 0

    def stumble(objective):
        nonlocal count
        count += 1
        time.sleep(2.0 if count == 8 else 0.0)  # one of those that are timed
        real(objective)

    monkeypatch.setattr(estimate.Objective, "after_step", stumble)
    monkeypatch.setattr(estimate, "TRIED_STEPS", 8)
    assert measure_step(tiny_plan, configure(), 0) < max(0.5, 5 * quick)
    assert count >= 8


def test_a_made_up_scan_has_every_class(tiny_plan, tmp_path):
    case = make_case(tiny_plan, tmp_path / "case", 0)
    assert case.image().shape == (1, 8, 8, 8)
    assert set(np.unique(case.label())) <= {0, 1, 2}
    assert set(case.class_voxels()) == {1, 2}


def test_a_window_takes_time(tiny_plan):
    assert 0 < measure_window(tiny_plan) < 10


@pytest.mark.parametrize("large", [{"batch": 10**7}, {"patch_size": (4096, 4096, 4096)}])
def test_a_step_that_does_not_fit_the_memory_is_refused_before_it_is_tried(tiny_plan, large):
    with pytest.raises(InputError, match="do not fit the memory"):
        measure_step(tiny_plan.model_copy(update=large), configure(), 0)


def test_a_student_s_step_that_does_not_fit_the_memory_is_refused(tiny_plan, monkeypatch):
    kind = type(build_network(tiny_plan.network))
    real = kind.forward_heads

    def forward(network, image):
        if len(image) > tiny_plan.batch:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")
        return real(network, image)

    monkeypatch.setattr(kind, "forward_heads", forward)
    settings = ["views=[strong, strong_2]", "train.unlabeled_ratio=[1, 2]", "rounds=2"]
    config = configure(*settings)
    assert measure_step(tiny_plan, config, 0) > 0
    with pytest.raises(InputError, match=r"10 patches .*, or train\.unlabeled_ratio=1 \("):
        measure_step(tiny_plan, config, 1)
