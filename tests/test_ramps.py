import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medssl.losses.ramps import ramp_value

NAMES = ("constant", "linear", "sigmoid")
fractions = st.floats(0, 1)


def test_constant_is_one_all_along():
    assert [ramp_value("constant", t) for t in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]


def test_linear_is_pseudo_labels_alpha():
    # Lee 2013: T1 = 0.2, T2 = 0.6; at 0.3 a quarter of the way.
    values = [ramp_value("linear", t, start=0.2, end=0.6) for t in (0.0, 0.2, 0.3, 0.6, 1.0)]
    assert values == pytest.approx([0.0, 0.0, 0.25, 1.0, 1.0])


def test_sigmoid_is_exp_of_minus_five_times_the_squared_rest():
    values = [ramp_value("sigmoid", t, end=0.5) for t in (0.0, 0.25, 0.5, 0.9)]
    assert values == pytest.approx([math.exp(-5), math.exp(-1.25), 1.0, 1.0])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_counts_before_the_start(name):
    assert ramp_value(name, 0.29, start=0.3, end=0.8) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_a_ramp_without_length_is_a_step(name):
    assert ramp_value(name, 0.39, start=0.4, end=0.4) == 0.0
    assert ramp_value(name, 0.4, start=0.4, end=0.4) == 1.0
    assert ramp_value(name, 0.0, start=0.0, end=0.0) == 1.0


@given(st.sampled_from(NAMES), fractions, fractions, fractions, fractions)
def test_every_ramp_is_a_fraction_and_never_falls(name, t1, t2, a, b):
    start, end = sorted((a, b))
    earlier, later = (ramp_value(name, t, start, end) for t in sorted((t1, t2)))
    assert 0 <= earlier <= later <= 1


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.4), (-0.1, 1.0), (0.0, 1.1)])
def test_a_ramp_outside_the_round_is_refused(start, end):
    with pytest.raises(ValueError, match="0 <= start <= end <= 1"):
        ramp_value("linear", 0.5, start, end)


def test_an_unknown_ramp_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'linear'"):
        ramp_value("cosine", 0.5)
