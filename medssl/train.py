"""The training loop, written once, for teacher and student alike.

Axes: B batch, C channels, I J K voxel axes.
"""

from __future__ import annotations

import collections
import math
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from medssl import ranks
from medssl.config import Config, InputError, at_round
from medssl.data.loaders import (
    PatchDataset,
    explain_killed_loader,
    is_fine_tune,
    iterate_batches,
)
from medssl.networks.build import arrange_weights
from medssl.networks.sharing import agree, meet_for_steps, start_alike, sum_gradients
from medssl.objective import Objective
from medssl.plan import Plan
from medssl.runs import Journal, StopFlag, hash_json, seed_from, write_file, write_state
from medssl.settings import hash_config

Sums = collections.defaultdict[str, float]
MOST_NONFINITE = 10  # steps in a row
HIGH_WAIT = 0.3  # share of the time spent waiting for data


def _do_nothing() -> None:
    """Do nothing."""


@explain_killed_loader()
def train_model(
    objective: Objective,
    dataset: PatchDataset,
    config: Config,
    plan: Plan,
    run_dir: Path,
    round_index: int,
    stop: StopFlag,
    validate: Callable[[], Mapping[str, float]] | None = None,
    on_checkpoint: Callable[[], None] = _do_nothing,
    member: int = 0,
    snapshots: Mapping[int, Callable[[], None]] = {},
) -> int:
    """Train one model of a round, from its checkpoint if there is one.

    Processes that share the steps (`medssl.networks.sharing`) all have the model and see the whole
    batch of each step; the first one alone writes and tells.

    Args:
        objective: Has student, losses and teacher; the contract stands in objective.py.
        dataset: The batch of each step; its seed is that of the whole training.
        config: The resolved configuration.
        plan: Steps, device and precision.
        run_dir: The run folder; the checkpoint goes to round_<r>/checkpoint.pt.
        round_index: 0 for labels only.
        stop: Checked after each step.
        validate: Returns val/* metrics; called when a checkpoint is written.
        on_checkpoint: Called after a checkpoint is on disk.
        member: Which model of an ensemble; those after the first keep checkpoint and journal in
            round_<r>/models/<member>/.
        snapshots: What to do after these steps, with the predictor as it is then.

    Returns:
        The number of steps done: fewer than planned if the stop flag was set.

    Raises:
        InputError: The checkpoint is not one of this run, or a loader process was killed.
        FloatingPointError: The loss was not finite for many steps in a row.
    """
    num_steps = at_round(plan.steps, round_index)
    device = torch.device(plan.device)
    dtype = torch.bfloat16 if plan.precision == "bfloat16" else torch.float32
    objective.to(device).train()
    arrange_weights(objective, plan.precision)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.train.lr, weight_decay=config.train.weight_decay, fused=True
    )
    folder = find_model_folder(run_dir, round_index, member)
    path = folder / "checkpoint.pt"
    identity = _identify(config, plan, round_index, member)
    meet_for_steps()  # whatever the first process did since the last ones
    step, record = _load(path, identity, objective, optimizer, device)
    start_alike(objective, step)
    journal = Journal((folder if member else run_dir) / "metrics.jsonl")
    journal.cut(round_index, step)
    progress = Progress(round_index, step, num_steps)
    batches = iterate_batches(
        dataset, step, num_steps, plan.workers, pin_memory=device.type == "cuda"
    )
    fine_tune_from = dataset.sampling.fine_tune_from
    while step < num_steps:
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        labeled = _move(batch["labeled"], device)
        unlabeled = _move(batch["unlabeled"], device)
        generator = _seed_step(dataset.sampling.seed, round_index, step)
        optimizer.param_groups[0]["lr"] = find_lr(
            config, step, num_steps, fine_tune_from, is_student=round_index > 0
        )
        if is_fine_tune(fine_tune_from, step):
            objective.fine_tune(first=step == fine_tune_from)

        # No cache: that of older torch (seen in 2.6) hands the student the weights cast in the
        # teacher's pass without gradients; where the teacher is the student they learn nothing.
        with torch.autocast(
            device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False
        ):
            terms = objective(labeled, unlabeled, step / num_steps, generator)
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        sum_gradients(parameters)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.grad_scale = (norm / config.train.grad_clip).clamp(min=1)  # type: ignore[attr-defined]  # of AMP
        objective.skipped = ~torch.isfinite(loss.detach() + norm)
        optimizer.found_inf = objective.skipped.float()  # type: ignore[attr-defined]  # of AMP
        optimizer.step()
        objective.after_step()
        step += 1

        figures = {f"losses/{name}": term for name, term in terms.items()}
        figures |= {"losses/total": loss, "monitors/grad_norm": norm}
        figures |= {f"monitors/{name}": value for name, value in objective.monitors.items()}
        record.add(figures, objective.skipped)
        is_told = step % config.train.log_every == 0 or step == num_steps
        if is_told:
            record.read()  # here the device is waited for, as a part of the step
        record.sums["monitors/data_wait"] += waited
        record.sums["seconds"] += time.perf_counter() - started
        if record.most_nonfinite >= MOST_NONFINITE:
            raise FloatingPointError(
                f"round {round_index}, step {step}: the loss was not finite for "
                f"{record.most_nonfinite} steps in a row; the last good checkpoint is {path}; "
                f"lower train.lr (now {config.train.lr:g}) or set train.precision=float32"
            )
        if is_told:
            metrics = _average(record.sums, optimizer.param_groups[0]["lr"])
            journal.append(round_index, step, metrics)
            progress.report(step, metrics)
        progress.advance(step)
        snapshots.get(step, _do_nothing)()  # before a checkpoint, which would not come back here
        stopping = agree(stop.is_set())
        if step % config.train.checkpoint_every == 0 or step == num_steps or stopping:
            if validate is not None:
                journal.append(round_index, step, validate())
                objective.train()
            record.read()
            _save(path, identity, objective, optimizer, step, record.sums)
            if not member:
                write_state(run_dir, "running", round_index, step)
            on_checkpoint()
            meet_for_steps()  # the others do not validate
        if stopping:
            break
    progress.close()
    return step


def _identify(config: Config, plan: Plan, round_index: int, member: int) -> str:
    """Return a hash of all that a checkpoint belongs to; that of 0.1.0 stays what it was."""
    elsewhere = {"estimate", "reasons", "device", "threads", "workers"}  # may change on resuming
    elsewhere |= set() if plan.palette else {"palette"}
    described = plan.model_dump(mode="json", exclude=elsewhere)
    return hash_json([hash_config(config), described, round_index, member])


def find_model_folder(run_dir: Path, round_index: int, member: int) -> Path:
    """Return where a model of a round is trained: the round's folder, or models/<member>/ in it."""
    folder = run_dir / f"round_{round_index}"
    return folder / "models" / str(member) if member else folder


def find_lr(
    config: Config,
    step: int,
    steps: int,
    fine_tune_from: int | None = None,
    is_student: bool = False,
) -> float:
    """Return the learning rate of a step.

    Linear warm-up, then polynomial decay to zero; the fine-tune has a constant one of its own.
    Source: Isensee et al. 2021 (nnU-Net), the exponent of 0.9.
    """
    if is_fine_tune(fine_tune_from, step):
        return config.train.fine_tune.lr
    steps = fine_tune_from or steps
    warmup = max(1, round(config.train.warmup * steps))
    rising = min(1.0, (step + 1) / warmup)
    section = config.train
    peak = section.lr if section.student_lr == "auto" or not is_student else section.student_lr
    return float(peak * rising * (1.0 - step / steps) ** 0.9)


def _seed_step(seed: int, round_index: int, step: int) -> torch.Generator:
    """Seed dropout and stochastic depth of a step; return the generator of its mixing."""
    torch.manual_seed(seed_from(seed, round_index, step, "noise"))
    return torch.Generator().manual_seed(seed_from(seed, round_index, step, "mixing"))


def _move(part: dict[str, Tensor] | None, device: torch.device) -> dict[str, Tensor] | None:
    """Bring a part of a batch to the device."""
    if part is None:
        return None
    return {key: value.to(device, non_blocking=True) for key, value in part.items()}


class Record:
    """What the steps since the last line of the journal have measured.

    The figures of a step stay on the device until a line of the journal or a checkpoint asks for
    them. Reading each at once, the host would wait for the device in every step, and then the
    device for the host.

    Args:
        sums: Of the steps before, where a checkpoint has any.
    """

    def __init__(self, sums: Mapping[str, float]) -> None:
        self.sums = Sums(float, sums)
        self.nonfinite = 0  # steps in a row
        self.most_nonfinite = 0
        self._unread: list[tuple[list[str], Tensor, dict[str, float]]] = []

    def add(self, figures: Mapping[str, Tensor | float], skipped: Tensor) -> None:
        """Take the figures of a step, and whether (bool, of one element) it was skipped.

        One that is NaN has no value in this step, and plays no part in a mean.
        """
        tensors = {name: value for name, value in figures.items() if isinstance(value, Tensor)}
        numbers = {name: float(figures[name]) for name in figures.keys() - tensors.keys()}
        row = [
            value.detach().reshape(()).to(skipped.device, non_blocking=True)
            for value in (*tensors.values(), skipped)
        ]
        self._unread.append((list(tensors), torch.stack(row), numbers))

    def read(self) -> None:
        """Add what was not read yet to the sums."""
        if not self._unread:
            return
        values = iter(torch.cat([row for _, row, _ in self._unread]).tolist())
        for names, _, numbers in self._unread:
            figures = {name: next(values) for name in names} | numbers
            is_skipped = bool(next(values))
            self.nonfinite = self.nonfinite + 1 if is_skipped else 0
            self.most_nonfinite = max(self.most_nonfinite, self.nonfinite)
            self.sums["steps"] += 1
            self.sums["monitors/nonfinite"] += int(is_skipped)
            for name, value in figures.items():
                if not is_skipped and not math.isnan(value):
                    self.sums[name] += value
                    self.sums[f"#{name}"] += 1
        self._unread.clear()


def _average(sums: Sums, lr: float) -> dict[str, float]:
    """Return the means since the last line of the journal, and start over."""
    seconds, steps = sums.pop("seconds"), sums.pop("steps")
    result = {
        "monitors/data_wait": sums.pop("monitors/data_wait") / max(seconds, 1e-9),
        "monitors/steps_per_second": steps / max(seconds, 1e-9),
        "monitors/nonfinite": float(sums.pop("monitors/nonfinite")),
        "monitors/lr": lr,
    }
    names = [name for name in sums if not name.startswith("#")]
    result |= {name: sums[name] / sums[f"#{name}"] for name in names}
    sums.clear()
    return result


def _save(
    path: Path,
    identity: str,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    step: int,
    sums: Sums,
) -> None:
    """Write the checkpoint atomically; the one before stands until the new one is whole."""
    if not ranks.is_first():
        return
    content = {
        "identity": identity,
        "step": step,
        "pending": dict(sums),
        "objective": objective.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    write_file(path, lambda temporary: torch.save(content, temporary))


def _load(
    path: Path,
    identity: str,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> tuple[int, Record]:
    """Restore a checkpoint; return its step and the record of the steps before it."""
    if not path.is_file():
        return 0, Record({})
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the check sums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        if content["identity"] != identity:
            raise InputError(
                f"{path}: made with another plan or configuration; give another --run, or --restart"
            )
        objective.load_state_dict(content["objective"])
        optimizer.load_state_dict(content["optimizer"])
        _arrange_state(optimizer)
        return int(content["step"]), Record(content["pending"])
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch raises many kinds for a damaged file, with unsafe advice
        raise InputError(
            f"{path}: cannot be read: damaged, or none of medssl ({type(error).__name__}); "
            "delete it, and this part of the run is trained anew"
        ) from error


def _arrange_state(optimizer: torch.optim.Optimizer) -> None:
    """Give what an optimizer holds of its weights their memory layout.

    The fused one takes value after value as it lies in memory, and a checkpoint may be of a version
    that had another layout.
    """
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == weight.shape:
                state[name] = torch.empty_like(weight).copy_(value)


class Progress:
    """A bar with rate and remaining time on a terminal, a line now and then in a log.

    Of several processes the first one shows it.
    """

    def __init__(self, round_index: int, first_step: int, steps: int) -> None:
        self.name = f"round {round_index}"
        self.first, self.steps = first_step, steps
        self.started = time.monotonic()
        self.bar: tqdm[Any] | None = None
        self.warned = False
        if sys.stderr.isatty() and ranks.is_first():
            self.bar = tqdm(
                total=steps, initial=first_step, desc=self.name, unit="step", dynamic_ncols=True
            )

    def advance(self, step: int) -> None:
        """Move the bar; in a log, tell the remaining time once, after 20 steps."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
        elif step - self.first == 20:
            print(f"{self.name}: {self._remaining(step)} remaining of this round", flush=True)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the losses; in a log, print a line."""
        if not ranks.is_first():
            return
        losses = {k.removeprefix("losses/"): v for k, v in metrics.items() if "losses/" in k}
        text = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
        else:
            rate = metrics["monitors/steps_per_second"]
            head = f"{self.name}: step {step}/{self.steps}  {text}"
            print(f"{head}  {rate:.2f} steps/s  ETA {self._remaining(step)}", flush=True)
        if metrics["monitors/data_wait"] > HIGH_WAIT and not self.warned:
            self.warned = True
            print(
                f"hint: {metrics['monitors/data_wait']:.0%} of the time goes into waiting for "
                "data; more loader processes may help: train.workers=4",
                file=sys.stderr,
            )

    def _remaining(self, step: int) -> str:
        """Return the remaining time of the round as h:mm:ss."""
        seconds = (time.monotonic() - self.started) / max(1, step - self.first)
        remaining = int(seconds * (self.steps - step))
        return f"{remaining // 3600}:{remaining // 60 % 60:02d}:{remaining % 60:02d}"

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
