"""One batch through a network in several processes, each of which takes its part of the patches.

What the network says of the whole batch then stands in all of them, and so mixing, filters, running
statistics and losses are those of one process, whatever they sum over. A process backpropagates
through the patches that were its own, and the sum of the gradients is that of the whole batch.
Without processes that share their steps (`share_steps`) nothing here does anything.

Axes: B batch, C channels, I J K voxel axes.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medssl import ranks
from medssl.config import InputError
from medssl.networks.noise import take_part

TIMEOUT_S = 600.0  # without an answer from another process, in the middle of a step


@contextlib.contextmanager
def share_steps(device: str) -> Iterator[None]:
    """Let the processes that torchrun started share all steps of training from here on.

    Args:
        device: Of this process.

    Raises:
        InputError: Another process has ended.
    """
    store = ranks.find_store()
    if store is None:
        yield
        return
    place, count = ranks.find_rank()
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    with ranks.explain_lost():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=distributed.PrefixStore("steps", store),  # type: ignore[attr-defined]  # it is there
            rank=place,
            world_size=count,
            timeout=datetime.timedelta(seconds=TIMEOUT_S),
        )
    yield
    distributed.destroy_process_group()  # after an error the process ends, and waits for nobody


def are_shared() -> bool:
    """Return whether several processes share the steps."""
    return distributed.is_initialized()


def share_batch(
    predict: Callable[[Tensor], Sequence[Tensor]], network: nn.Module, image: Tensor
) -> list[Tensor]:
    """Return what is predicted of a batch, of which this process predicts its part.

    Each takes as many patches; where they do not come out even, the last one is predicted more
    than once, and counts once.

    Args:
        predict: Returns tensors (B, ...) of an image (B, C, I, J, K), one patch apart from another.
        network: What it predicts with; its noise is that of the patches in the whole batch.
        image: The whole batch, the same in all processes.
    """
    if not are_shared():
        return list(predict(image))
    count, place = len(image), distributed.get_rank()
    size = -(-count // distributed.get_world_size())
    places = [min(index, count - 1) for index in range(place * size, (place + 1) * size)]
    with take_part(network, places, count):
        parts = predict(image[places])
    return [_Gather.apply(part, count) for part in parts]


class _Gather(torch.autograd.Function):
    """Brings parts of a batch together; the gradient of the whole goes to its parts."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, count: int) -> Tensor:
        """Return the first ``count`` of the patches of all processes."""
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(distributed.get_world_size())]
        with ranks.explain_lost():
            distributed.all_gather(parts, part)
        ctx.part = part.shape
        return torch.cat(parts)[:count]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of this process's patches, 0 for those that count elsewhere."""
        start = distributed.get_rank() * ctx.part[0]
        mine = gradient[start : start + ctx.part[0]]
        repeated = mine.new_zeros(ctx.part[0] - len(mine), *ctx.part[1:])
        return torch.cat([mine, repeated]), None


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes: that of a loss that all have of the whole batch."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not are_shared() or not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    with ranks.explain_lost():
        distributed.all_reduce(flat)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, summed in zip(gradients, torch.split(flat, sizes), strict=True):
        gradient.copy_(summed.view_as(gradient))


def meet_for_steps() -> None:
    """Wait for the processes that share the steps, however long that takes."""
    if are_shared():
        ranks.meet()


def start_alike(network: nn.Module, step: int) -> None:
    """Give all processes the weights and buffers of the first one.

    Args:
        network: Weights and buffers are overwritten.
        step: Where this process goes on.

    Raises:
        InputError: A process goes on at another step, or the network has batch norm.
    """
    if not are_shared():
        return
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        raise InputError(
            "batch norm, of a pretrained encoder, takes its statistics over the whole batch, which "
            "several processes share: start the same command without torchrun, or set "
            "network.pretrained=false"
        )
    with ranks.explain_lost():
        first = torch.tensor([step])
        distributed.broadcast(first, 0)
        if int(first) != step:
            raise InputError(
                f"process {distributed.get_rank()} goes on at step {step}, the first one at "
                f"{int(first)}: let the run folder lie where all of them see it"
            )
        for tensor in network.state_dict().values():
            distributed.broadcast(dense := tensor.contiguous(), 0)
            tensor.copy_(dense)


def agree(flag: bool) -> bool:
    """Return whether any process says so; all of them ask after the same step."""
    if not are_shared():
        return flag
    said = torch.tensor([int(flag)])
    with ranks.explain_lost():
        distributed.all_reduce(said, distributed.ReduceOp.MAX)
    return bool(said)
