"""What a training step costs beside the bare passes of its networks.

Each row is a method in 2D or 3D. Its real steps (patches, objective, backward pass, optimizer, EMA)
take turns with the bare ones: the same networks on the same tensors, forward and backward, with
nothing around them. Both are measured in seconds of the processor, on one thread, with no loader
processes, so that other programs disturb little; what counts is their ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from medssl.data.phantoms import write_phantoms
from medssl.objective import Objective
from medssl.plan import Plan
from medssl.rounds.estimate import make_trial
from medssl.rounds.loop import prepare_run
from medssl.runs import StopFlag
from medssl.settings import Resolved, load_config
from medssl.train import train_model

METHODS = ("labels", "default", "fixmatch")
PLANS = {2: "[112,128]", 3: "[48,48,48]"}
Forward = Callable[[Tensor], Tensor | list[Tensor]]
WARM_UP = 2  # steps of each turn that are not measured


@dataclass(frozen=True)
class Call:
    """A pass that a step asked of a network: forward alone, or backward too."""

    network: nn.Module
    forward: Forward
    image: Tensor
    has_gradient: bool
    is_training: bool


class _Clock(StopFlag):
    """Notes the processor's time after each step, and stops after as many."""

    def __init__(self, folder: Path, steps: int) -> None:
        super().__init__(folder)
        self.steps = steps
        self.times: list[float] = []

    def is_set(self) -> bool:
        """Return whether all steps are done."""
        self.times.append(time.process_time())
        return len(self.times) >= self.steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be asked for."""
    parser.add_argument("--methods", default=",".join(METHODS), help="labels, or presets")
    parser.add_argument("--dimensions", default="2,3")
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--steps", type=int, default=6, help="of each turn")
    parser.add_argument("--turns", type=int, default=4)


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Measure each row and print a table."""
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    print(
        "| method | dimension | precision | step | bare | step / bare |\n|---|---|---|---|---|---|"
    )
    choices = (arguments.dimensions, arguments.precisions, arguments.methods)
    for dimension, precision, method in itertools.product(*(text.split(",") for text in choices)):
        row = {"method": method, "dimension": int(dimension), "precision": precision}
        step, bare = measure_step(**row, steps=arguments.steps, turns=arguments.turns)
        rows.append({**row, "step": step, "bare": bare, "ratio": step / bare})
        print(
            f"| {method} | {dimension} | {precision} | {step:.3f} s | {bare:.3f} s "
            f"| {step / bare:.2f} |",
            flush=True,
        )
    return rows


def measure_step(
    method: str, dimension: int, precision: str, steps: int, turns: int
) -> tuple[float, float]:
    """Return the seconds of a step and of its bare passes, medians over all turns.

    Args:
        method: A preset's student, or "labels", its round 0.
        dimension: 2 or 3.
        precision: float32 or bfloat16.
        steps: Steps of a turn.
        turns: How often both are measured.
    """
    real, bare = [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plan, resolved = make_plan(folder / "scans", method, dimension, precision)
        index = 0 if method == "labels" else 1
        objective, dataset = make_trial(plan, resolved.config, index, folder)
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32

        def train(number: int, count: int) -> list[float]:
            turn = folder / f"turn_{number}"
            clock = _Clock(turn, count)
            longer = plan.model_copy(update={"steps": 10 * count})
            with contextlib.redirect_stdout(io.StringIO()):
                train_model(objective, dataset, resolved.config, longer, turn, index, clock)
            return [after - before for before, after in itertools.pairwise(clock.times)]

        with record_calls(objective) as calls:
            train(turns, 1)
        for turn in range(turns):
            real += train(turn, steps)[WARM_UP - 1 :]
            bare += [repeat_calls(calls, dtype) for _ in range(steps)][WARM_UP:]
    return statistics.median(real), statistics.median(bare)


def make_plan(folder: Path, method: str, dimension: int, precision: str) -> tuple[Plan, Resolved]:
    """Return the plan of phantoms and the resolved configuration of a method on them."""
    write_phantoms(folder, num_labeled=2, num_unlabeled=2, num_test=0, shape=(64, 64, 48))
    preset = "default" if method == "labels" else method
    settings = [
        *(f"method={preset}", f"plan.dimension={dimension}", f"train.precision={precision}"),
        *(f"plan.patch_size={PLANS[dimension]}", "train.workers=0", "validation=0"),
    ]
    resolved = load_config(str(folder), settings)
    prepared = prepare_run(resolved, lambda _: resolved, None)
    return prepared.plan, prepared.resolved


@contextlib.contextmanager
def record_calls(objective: Objective) -> Iterator[list[Call]]:
    """Record the passes that the objective asks of its networks, but not the passes inside them."""
    calls: list[Call] = []
    busy: set[nn.Module] = set()

    def spy(network: nn.Module, forward: Forward) -> Forward:
        def note(image: Tensor) -> Tensor | list[Tensor]:
            if network in busy:
                return forward(image)
            has_gradient = torch.is_grad_enabled()
            calls.append(Call(network, forward, image.clone(), has_gradient, network.training))
            busy.add(network)
            try:
                return forward(image)
            finally:
                busy.remove(network)

        return note

    with contextlib.ExitStack() as stack:
        for network in (objective.student, objective.teacher.module):
            for name in ("forward", "forward_heads"):
                setattr(network, name, spy(network, getattr(network, name)))
                stack.callback(delattr, network, name)
        yield calls


def repeat_calls(calls: list[Call], dtype: torch.dtype) -> float:
    """Repeat the passes with nothing around them; return the seconds that they take."""
    started = time.process_time()
    outputs: list[Tensor] = []
    for call in calls:
        call.network.train(call.is_training)
        enabled = dtype != torch.float32
        with (
            torch.set_grad_enabled(call.has_gradient),
            torch.autocast("cpu", dtype, enabled=enabled, cache_enabled=False),
        ):
            heads = call.forward(call.image)
        if call.has_gradient:
            outputs += heads if isinstance(heads, list) else [heads]
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    for call in calls:
        call.network.zero_grad(set_to_none=True)
    return time.process_time() - started
