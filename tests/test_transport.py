# Axes: N voxels, C classes, B batch, I J K voxels (K absent in 2D). q is the assignment.
import math
import warnings

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from medssl.pseudo.transport import (
    LOWEST_LOG_PROB,
    RunningTransport,
    assign,
    fit_potentials,
    shrink_prior,
    spare_rare,
)

PRIOR = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)


def draw_probs(*shape, seed=0, scale=1.5):
    """Probs over axis 1 in float64, where no rounding hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(scale * torch.randn(shape, generator=generator, dtype=torch.float64), 1)


def transport(probs, prior=PRIOR, epsilon=0.1, rho=1.0, iterations=50):
    return assign(probs, fit_potentials(probs, prior, epsilon, rho, iterations), epsilon)


def test_a_class_of_few_voxels_is_neither_favored_nor_penalized():
    probs = torch.softmax(torch.tensor([3.0, 1.0, -8.0]) + torch.zeros(2000, 3), 1)
    probs[:3] = torch.tensor([0.1, 0.1, 0.8])
    log_v = fit_potentials(probs, torch.tensor([0.5, 0.3, 0.2]), 0.1, 10.0, 500)
    spared = spare_rare(log_v, torch.bincount(probs.argmax(1), minlength=3))
    assert assign(probs, log_v, 0.1)[:, 2].mean() > 0.05, "out of three voxels of 2,000"
    assert assign(probs, spared, 0.1)[:, 2].mean() < 0.01
    assert assign(probs, spared, 0.1).argmax(1).eq(2).sum() == 3
    many = torch.tensor([1000, 500, 500])
    assert torch.equal(spare_rare(log_v, many), log_v)


def solve_with_pot(probs, prior, epsilon, rho):
    """Return POT's plan with rows scaled to 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # POT says that reg_type entropy overwrites c
        plan = ot.unbalanced.sinkhorn_unbalanced(
            torch.full((len(probs),), 1 / len(probs), dtype=torch.float64),
            prior,
            -probs.log(),
            epsilon,
            (math.inf, rho),
            reg_type="entropy",
            numItermax=20_000,
            stopThr=1e-14,
        )
    return plan * len(probs)


def as_batch(probs):
    """Return voxels (N, C) as (1, C, N, 1, 1), and all of them as valid."""
    batch = probs.T[None, :, :, None, None]
    return batch, torch.ones_like(batch[:, :1], dtype=torch.bool)


@pytest.mark.parametrize(
    ("epsilon", "rho"),
    [(0.05, 0.5), (0.1, 1.0), (0.1, 0.1), (0.5, 0.2), (0.5, 5.0), (0.2, math.inf)],
)
def test_the_assignment_is_that_of_pot(epsilon, rho):
    probs = draw_probs(40, 3)
    found = transport(probs, PRIOR, epsilon, rho, iterations=600)
    assert torch.allclose(found, solve_with_pot(probs, PRIOR, epsilon, rho), atol=1e-5, rtol=0)


@pytest.mark.parametrize("epsilon", [0.05, 0.1])
def test_fifty_iterations_leave_what_the_docstring_says(epsilon):
    # voxels so certain that the fixed point is at its slowest, and a prior near their shares
    probs = torch.full((200, 2), 1e-4, dtype=torch.float64)
    probs[:120, 0] = probs[120:, 1] = 1 - 1e-4
    prior = torch.tensor([0.58, 0.42], dtype=torch.float64)
    limit, found, start = (
        fit_potentials(probs, prior, epsilon, 1.0, n).diff().item() for n in (800, 50, 0)
    )
    left = abs((found - limit) / (start - limit))
    assert 0.5 * (1 / (1 + epsilon)) ** 50 < left < (1 / (1 + epsilon)) ** 50 + 1e-6


def test_two_voxels_by_hand():
    # v = (1, r) by symmetry of p: with p = (a, 1 - a), (1 - a, a), a = 0.8, epsilon 1, prior
    # (1/4, 3/4), the first column of q is a/(a + (1-a) r) + (1-a)/((1-a) + a r) = 1/2, so
    # 0.16 r^2 - 0.68 r - 0.48 = 0, after multiplying out; r = (0.68 + sqrt(0.7696)) / 0.32
    probs = torch.tensor([[0.8, 0.2], [0.2, 0.8]], dtype=torch.float64)
    prior = torch.tensor([0.25, 0.75], dtype=torch.float64)
    log_v = fit_potentials(probs, prior, 1.0, math.inf, 200)
    assert log_v.diff().exp().item() == pytest.approx((0.68 + math.sqrt(0.7696)) / 0.32)


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0])
def test_without_a_weight_of_the_prior_probs_are_only_sharpened(epsilon):
    probs = draw_probs(50, 3)
    power = probs ** (1 / epsilon)
    sharpened = power / power.sum(1, keepdim=True)
    assert torch.allclose(transport(probs, epsilon=epsilon, rho=0.0), sharpened)
    assert torch.allclose(transport(probs, epsilon=epsilon, rho=1e-6), sharpened, atol=1e-4)


def test_with_an_infinite_weight_the_prior_is_met():
    found = transport(draw_probs(400, 3), rho=math.inf, iterations=500).mean(0)
    assert torch.allclose(found, PRIOR, atol=1e-6)
    found = transport(draw_probs(400, 3), rho=1e4, iterations=500).mean(0)
    assert torch.allclose(found, PRIOR, atol=1e-3)


def test_shares_come_nearer_to_the_prior_as_its_weight_rises():
    probs = draw_probs(400, 3)
    distance = [
        float((transport(probs, rho=rho, iterations=300).mean(0) - PRIOR).abs().sum())
        for rho in (0.0, 0.1, 0.5, 2.0, 20.0)
    ]
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 0.1 * distance[0]


def test_a_prior_that_the_probs_have_changes_nothing():
    probs = draw_probs(400, 3)
    sharpened = transport(probs, rho=0.0)
    assert torch.allclose(transport(probs, sharpened.mean(0), rho=1.0), sharpened, atol=1e-12)


@given(
    st.integers(0, 1000),
    st.floats(0.02, 1.0),
    st.sampled_from([0.0, 0.3, 1.0, 10.0, math.inf]),
    st.floats(0.0, 30.0),
)
@settings(max_examples=25)
def test_q_is_on_the_simplex(seed, epsilon, rho, scale):
    probs = draw_probs(30, 3, seed=seed, scale=scale).float()
    found = transport(probs, PRIOR.float(), epsilon, rho)
    assert torch.isfinite(found).all()
    assert (found >= 0).all()
    assert torch.allclose(found.sum(1), torch.ones(30), atol=1e-5)


def test_the_number_of_voxels_plays_no_part():
    probs = draw_probs(20, 3)
    once, thrice = fit_potentials(probs, PRIOR), fit_potentials(probs.repeat(3, 1), PRIOR)
    assert torch.allclose(once, thrice)


@given(st.integers(0, 1000), st.permutations(range(3)), st.permutations(range(20)))
@settings(max_examples=15)
def test_permuted_classes_or_voxels_are_permuted_in_q(seed, classes, voxels):
    probs = draw_probs(20, 3, seed=seed)
    found = transport(probs)
    assert torch.allclose(transport(probs[:, classes], PRIOR[classes]), found[:, classes])
    assert torch.allclose(transport(probs[voxels]), found[voxels])


def test_a_shift_of_all_potentials_plays_no_part():
    probs, log_v = draw_probs(20, 3), torch.tensor([0.3, -2.0, 1.0])
    assert torch.allclose(assign(probs, log_v, 0.1), assign(probs, log_v + 7.0, 0.1))


@pytest.mark.parametrize("size", [(4,), (4, 5), (4, 5, 6)])
def test_every_number_of_axes_is_assigned_alike(size):
    probs = draw_probs(2, 3, *size)
    log_v = torch.tensor([0.5, -1.0, 2.0])
    flat = assign(probs.movedim(1, -1).reshape(-1, 3), log_v, 0.2)
    found = assign(probs, log_v, 0.2)
    assert found.shape == probs.shape
    assert torch.allclose(found.movedim(1, -1).reshape(-1, 3), flat)


def test_probs_of_zero_are_read_as_one_millionth():
    probs = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.4, 0.0]])
    raised = torch.tensor([[1.0, 1e-6, 1e-6], [0.6, 0.4, 1e-6]])
    assert math.exp(LOWEST_LOG_PROB) == pytest.approx(1e-6)
    log_v = fit_potentials(probs, PRIOR.float(), 0.1, math.inf, 20)
    assert torch.isfinite(log_v).all()
    assert torch.allclose(log_v, fit_potentials(raised, PRIOR.float(), 0.1, math.inf, 20))
    assert torch.allclose(assign(probs, log_v, 0.1), assign(raised, log_v, 0.1))


def test_probs_in_half_precision_are_assigned_in_float32():
    probs = draw_probs(20, 3).half()
    found = transport(probs, PRIOR.float())
    assert found.dtype == torch.float32
    assert torch.allclose(found, transport(probs.float(), PRIOR.float()))


class Count(TorchFunctionMode):
    """Counts the elements that operations put out, all of them and the most of one."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.total += result.numel()
            self.largest = max(self.largest, result.numel())
        return result


def test_work_and_memory_are_linear_in_the_voxels():
    counts = {}
    for num_voxels in (1000, 2000, 4000):
        probs = draw_probs(num_voxels, 3)
        with Count() as counts[num_voxels]:
            transport(probs, iterations=5)
        assert counts[num_voxels].largest == 3 * num_voxels
    doubled = counts[2000].total - counts[1000].total
    assert counts[4000].total - counts[2000].total == 2 * doubled > 0


def test_a_shrunk_prior_lies_between_both():
    labeled, pool = torch.tensor([0.8, 0.2, 0.0]), torch.tensor([0.6, 0.2, 0.2])
    assert torch.allclose(shrink_prior(labeled, pool, 0.0), labeled)
    assert torch.allclose(shrink_prior(labeled, pool, 1.0), pool)
    found = shrink_prior(labeled, pool, 0.25)
    assert torch.allclose(found, torch.tensor([0.75, 0.2, 0.05]))


def test_online_potentials_reach_the_offline_ones_on_a_batch_that_comes_again():
    probs = draw_probs(60, 3)
    running = RunningTransport(3, PRIOR, 0.2, 0.5).double()
    batch, valid = as_batch(probs)
    for _ in range(400):
        running.update(batch, valid)
    offline = fit_potentials(probs, PRIOR, 0.2, 0.5, 600)
    assert torch.allclose(running.log_v.diff(), offline.diff(), atol=1e-5)


def test_online_shares_are_the_offline_ones_on_batches_that_lack_a_class():
    # each batch is nearly all of one class, as a patch may be; all together they are stationary
    generator = torch.Generator().manual_seed(0)
    parts = [draw_probs(40, 3, seed=i) ** 0.5 for i in range(3)]
    for i, part in enumerate(parts):
        part[:, i] += 1.5
    parts = [part / part.sum(1, keepdim=True) for part in parts]
    pool = torch.cat(parts)
    running = RunningTransport(3, PRIOR, 0.3, 1.0).double()
    shares = []
    for step in range(900):
        running.update(*as_batch(parts[int(torch.randint(3, (), generator=generator))]))
        if step >= 300:
            found = assign(as_batch(pool)[0], running.log_v, running.epsilon)
            shares.append(found.mean((0, 2, 3, 4)))
    offline = transport(pool, PRIOR, 0.3, 1.0, 300).mean(0)
    plain = transport(pool, PRIOR, 0.3, 0.0).mean(0)
    assert (plain - offline).abs().max() > 0.1
    assert (torch.stack(shares).mean(0) - offline).abs().max() < 0.02


def test_the_first_update_is_the_first_iteration_without_a_bias_to_the_start():
    probs = draw_probs(60, 3)
    running = RunningTransport(3, PRIOR, 0.1, 1.0).double()
    running.update(*as_batch(probs))
    assert torch.allclose(running.log_v, fit_potentials(probs, PRIOR, 0.1, 1.0, 1))


@pytest.mark.parametrize("rho", [0.0, 1.0, math.inf])
def test_voxels_that_do_not_count_move_nothing(rho):
    batch, valid = as_batch(draw_probs(60, 3).float())
    half = valid.clone()
    half[:, :, 30:] = False
    poisoned = torch.where(half, batch, math.nan)
    one, other = RunningTransport(3, PRIOR, rho=rho), RunningTransport(3, PRIOR, rho=rho)
    one.update(batch[:, :, :30], valid[:, :, :30])
    other.update(poisoned, half)
    assert torch.allclose(one.log_v, other.log_v)
    before = {key: value.clone() for key, value in one.state_dict().items()}
    one.update(batch, valid & False)
    assert all(torch.equal(before[key], value) for key, value in one.state_dict().items())


def test_potentials_and_their_age_are_in_the_state():
    first, second = RunningTransport(3, PRIOR), RunningTransport(3, torch.full((3,), 1 / 3))
    for seed in range(3):
        first.update(*as_batch(draw_probs(60, 3, seed=seed).float()))
    second.load_state_dict(first.state_dict())
    batch, valid = as_batch(draw_probs(60, 3, seed=9).float())
    for running in (first, second):
        running.update(batch, valid)
    assert torch.equal(first.log_v, second.log_v)


def test_a_slice_is_a_volume_of_one_slice():
    probs, valid = draw_probs(2, 3, 8, 8).float(), torch.rand(2, 1, 8, 8) < 0.7
    planar, solid = RunningTransport(3, PRIOR), RunningTransport(3, PRIOR)
    planar.update(probs, valid)
    solid.update(probs[..., None], valid[..., None])
    assert torch.equal(planar.log_v, solid.log_v)
    found = assign(probs[..., None], solid.log_v, solid.epsilon)
    assert torch.equal(assign(probs, planar.log_v, planar.epsilon), found[..., 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: fit_potentials(p, PRIOR[:2]), "3 classes"),
        (lambda p: fit_potentials(p, PRIOR * 2), "sum 2"),
        (lambda p: fit_potentials(p, torch.tensor([0.5, 0.5, 0.0])), "share above 0"),
        (lambda p: fit_potentials(p, torch.tensor([0.5, 0.5, math.nan])), "share above 0"),
        (lambda p: fit_potentials(p, PRIOR, epsilon=0.0), "epsilon is 0.0"),
        (lambda p: fit_potentials(p, PRIOR, rho=-1.0), "rho -1.0"),
        (lambda p: fit_potentials(p[None], PRIOR), r"\(N, C\)"),
        (lambda p: fit_potentials(p[:0], PRIOR), r"\(0, 3\)"),
        (lambda p: assign(p, torch.zeros(2), 0.1), r"log_v is \(2,\)"),
        (lambda p: assign(p, torch.zeros(3), math.inf), "epsilon is inf"),
        (lambda p: shrink_prior(PRIOR, PRIOR, 1.5), "strength is 1.5"),
        (lambda p: shrink_prior(PRIOR, PRIOR[:2], 0.5), r"\(3,\).* \(2,\)"),
        (lambda p: RunningTransport(4, PRIOR), "4 classes"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(draw_probs(5, 3))
