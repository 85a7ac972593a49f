"""A training step gives the device its work and goes on: nothing in it waits for a result.

On a GPU the host then runs ahead. Without one the calls that would wait are found all the same.
"""

import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from medssl import train
from medssl.networks.build import build_network
from medssl.objective import Objective, load_objective
from medssl.settings import load_config

FULL = Path(__file__).with_name("full.yaml")
NAMES = ("background", "organ", "lesion")
LINE_EVERY, STEPS = 3, 6
TORCH = str(Path(torch.__file__).parent)
aten = torch.ops.aten
ASKING = {
    aten._local_scalar_dense, aten.is_nonzero, aten.item, aten.equal, aten.nonzero, aten.argwhere,
    aten.masked_select, aten.bincount, aten._unique2, aten.unique_dim, aten.unique_consecutive,
    aten.repeat_interleave,
}  # fmt: skip
"""What returns a value to the host, or a tensor whose shape depends on values."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
MOVING = {torch.tensor, torch.as_tensor, torch.from_numpy}
READING = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}


class Waits(TorchDispatchMode):
    """Notes the lines that wait for the device, by step; what a generator draws is the host's."""

    def __init__(self):
        super().__init__()
        self.step, self.lines = 0, set()
        self.drawn = {}
        self.calls = Calls(self)

    def note(self):
        stack = traceback.extract_stack()
        frame = [f for f in stack if "/medssl/" in f.filename and f.filename != __file__] or stack
        self.lines.add((self.step, f"{frame[-1].filename}:{frame[-1].lineno}: {frame[-1].line}"))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            self.drawn[result.data_ptr()] = result  # which keeps the place taken
        asks = func.overloadpacket in ASKING and args[0].data_ptr() not in self.drawn
        by_mask = func.overloadpacket in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if asks or by_mask:
            self.note()
        return result


class Calls(TorchFunctionMode):
    """Hears the calls that a CPU answers without an operation: reading, and moving at once."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        moves = func is torch.Tensor.to and ("device" in kwargs or type(args[1]) is torch.device)
        is_torch = sys._getframe(1).f_code.co_filename.startswith(TORCH)  # it has checked where to
        if func in MOVING | READING or (moves and not kwargs.get("non_blocking") and not is_torch):
            self.waits.note()
        return func(*args, **kwargs)


def draw_before(dataset, waits):
    """Yield the batches of all steps, which are drawn before the first one begins."""
    batches = [dataset[step] for step in range(STEPS)]
    with waits.calls, waits:
        for step, batch in enumerate(batches, start=1):
            waits.step = step
            yield batch


@pytest.fixture
def find_waits(tiny_spec, tiny_plan, make_dataset, stop_at, tmp_path, monkeypatch):
    """Return a function that trains a few steps and gives the waiting lines by step."""

    def run(method, round_index=1, kind=None):
        settings = [f"method={method}", f"train.log_every={LINE_EVERY}", "network.dropout=0.1"]
        config = load_config(overrides=settings).config
        spec = tiny_spec.model_copy(update={"dropout": 0.1})
        kind = kind or (load_objective(config.objective) if round_index else Objective)
        objective = kind(build_network(spec), config, NAMES, torch.tensor([0.6, 0.3, 0.1]))
        waits = Waits()
        monkeypatch.setattr(
            train, "iterate_batches", lambda dataset, *_, **__: draw_before(dataset, waits)
        )
        plan = tiny_plan.model_copy(update={"steps": STEPS, "network": spec})
        dataset = make_dataset(round_index)
        train.train_model(objective, dataset, config, plan, tmp_path, round_index, stop_at(None))
        return waits.lines

    return run


@pytest.mark.parametrize(
    ("method", "round_index"),
    [
        ("default", 0),
        *((method, 1) for method in ("default", "fixmatch", "freematch", "cross_pseudo", FULL)),
    ],
)
def test_no_step_waits_for_the_device_but_those_that_end_a_line(find_waits, method, round_index):
    lines = find_waits(method, round_index)
    assert not [line for step, line in sorted(lines) if step % LINE_EVERY]
    assert {step for step, _ in lines} == set(range(LINE_EVERY, STEPS + 1, LINE_EVERY))


WAITING = {
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.any()),
    "list": lambda x: x.tolist(),
    "array": lambda x: x.numpy(),
    "mask": lambda x: x[x > 0],
    "write": lambda x: x.clone().__setitem__(x > 0, x[:1]),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "count": lambda x: x.long().bincount(),
    "equal": lambda x: torch.equal(x, x),
    "index": lambda x: x[x.long().argmax()],
    "one-hot": lambda x: torch.nn.functional.one_hot(x.long(), 5),
    "move": lambda x: x.to(x.device),
    "make": lambda x: torch.tensor([1.0], device=x.device),
}


@pytest.mark.parametrize("ask", WAITING.values(), ids=WAITING)
def test_what_would_wait_is_heard(ask):
    waits = Waits()
    values = torch.arange(4.0)
    with waits.calls, waits:
        ask(values)
    assert waits.lines


def test_a_draw_of_the_host_does_not_wait():
    waits = Waits()
    generator = torch.Generator().manual_seed(0)
    with waits.calls, waits:
        assert torch.rand((), generator=generator).item() < 1
        assert int(torch.randint(3, (), generator=generator)) < 3
    assert not waits.lines
