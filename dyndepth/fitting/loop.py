"""The optimisation loop that all training here shares.

It knows nothing of routers or adapters: it is given an objective and parameters. Accelerate brings
mixed precision, gradient accumulation and several devices. A run that is killed goes on from its
last checkpoint with the same curve: windows are a function of the step, and so is all randomness.
"""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dyndepth.common.errors import UserError
from dyndepth.common.files import write_atomically
from dyndepth.common.paths import file_part
from dyndepth.models.seeding import seeded

if TYPE_CHECKING:
    from dyndepth.data.corpus import Windows


Curve = list[dict[str, float]]
Objective = Callable[[Tensor, int], tuple[Tensor, dict[str, float]]]
"""``(ids [batch, length], step) -> (loss to minimise, what the curve records)``."""

CHECKPOINT_SECONDS = float(os.environ.get("DYNDEPTH_CHECKPOINT_SECONDS", "60"))
_folder: ContextVar[Path | None] = ContextVar("checkpoints", default=None)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how hard to train.

    ``steps`` of the optimiser (AdamW), each over ``accumulate`` micro-batches of ``batch`` windows
    of ``length`` tokens in every process. Rates rise linearly over the share ``warm_up`` of all
    steps, then stay (``constant``) or fall to zero (``cosine``). ``precision`` is autocast's.
    """

    steps: int
    batch: int
    length: int
    accumulate: int = 1
    warm_up: float = 0.05
    decay: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"

    @classmethod
    def of(cls, recipe: Any, **changes: Any) -> Schedule:
        """The schedule among the attributes of ``recipe``, with ``changes``."""
        names = [field.name for field in fields(cls) if hasattr(recipe, field.name)]
        return cls(**{name: getattr(recipe, name) for name in names} | changes)

    def rate(self, step: int) -> float:
        """Factor on every learning rate at ``step``, counted from 0."""
        rising = min(1.0, (step + 1) / max(1.0, self.warm_up * self.steps))
        if self.decay == "constant":
            return rising
        return rising * (1 + math.cos(math.pi * step / self.steps)) / 2

    @property
    def windows(self) -> int:
        """Windows that all processes read together."""
        from accelerate import PartialState

        return self.steps * self.accumulate * self.batch * PartialState().num_processes


@contextmanager
def checkpoints(folder: Path | None) -> Iterator[None]:
    """Loops that run inside keep their checkpoints in ``folder``; it is theirs alone."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def optimise(
    objective: Objective,
    groups: Sequence[dict[str, Any]],
    windows: Tensor | Windows,
    schedule: Schedule,
    *,
    name: str,
    seed: int = 0,
    progress: bool = True,
) -> Curve:
    """Train the parameters of ``groups`` (torch's parameter groups, each with ``lr``) in place.

    ``windows`` is int64 ``[at least schedule.windows, length]``, or a corpus's reader of as many,
    used in order. ``name`` names the checkpoint and heads the progress bar. Returns the curve, a
    row a step: what the objective recorded, averaged over the step's micro-batches and processes,
    and ``tokens``, read so far.
    Raises UserError if there are too few windows, FloatingPointError if the loss is not a number.
    """
    if len(windows) < schedule.windows:
        raise UserError(f"training reads {schedule.windows} windows, {len(windows)} were given")
    parameters = [p for group in groups for p in group["params"]]
    accelerator = _accelerator(parameters[0].device, schedule.precision)
    optimiser = torch.optim.AdamW(
        list(groups), weight_decay=schedule.weight_decay, betas=(0.9, 0.99)
    )
    rates = [group["lr"] for group in optimiser.param_groups]
    curve: Curve = []

    def state() -> dict[str, Any]:
        values = [parameter.detach().cpu() for parameter in parameters]
        kept = {"parameters": values, "optimiser": optimiser.state_dict(), "curve": curve}
        scaler = accelerator.scaler
        return kept | ({"scaler": scaler.state_dict()} if scaler is not None else {})

    def take(kept: dict[str, Any]) -> None:
        for parameter, value in zip(parameters, kept["parameters"], strict=True):
            parameter.data.copy_(value)
        optimiser.load_state_dict(kept["optimiser"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(kept["scaler"])
        curve.extend(kept["curve"])

    checkpoint = Checkpoint(name)
    checkpoint.restore(take)
    stepper = accelerator.prepare_optimizer(optimiser)
    processes, rank = accelerator.num_processes, accelerator.process_index
    bar = tqdm(
        total=schedule.steps,
        initial=len(curve),
        desc=name,
        unit="step",
        disable=not (progress and accelerator.is_main_process),
    )
    with bar:
        for step in range(len(curve), schedule.steps):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * schedule.rate(step)
            rows = []
            for part in range(schedule.accumulate):
                index = (step * schedule.accumulate + part) * processes + rank
                ids = windows[index * schedule.batch : (index + 1) * schedule.batch]
                ids = ids.to(parameters[0].device)
                with seeded(seed * 1_000_003 + index, ids.device), accelerator.autocast():
                    loss, row = objective(ids, step)
                if not bool(torch.isfinite(loss)):
                    raise FloatingPointError(f"{name}: the loss at step {step} is not a number")
                accelerator.backward(loss / schedule.accumulate)
                rows.append(row)
            if processes > 1:
                for parameter in parameters:
                    # A process in which it took no part must still answer the others.
                    own = parameter.grad
                    own = torch.zeros_like(parameter) if own is None else own
                    parameter.grad = accelerator.reduce(own, "mean")
            stepper.step()
            stepper.zero_grad()
            read = (step + 1) * schedule.accumulate * processes * ids.numel()
            curve.append(_mean(rows, accelerator) | {"tokens": float(read)})
            bar.set_postfix({k: f"{v:.3f}" for k, v in curve[-1].items() if k != "tokens"})
            bar.update()
            if accelerator.is_main_process:
                checkpoint.save(state, last=step + 1 == schedule.steps)
    return curve


def _mean(rows: Sequence[dict[str, float]], accelerator: Any) -> dict[str, float]:
    """Each entry averaged over micro-batches and processes."""
    means = torch.tensor([[row[key] for key in rows[0]] for row in rows], dtype=torch.float64)
    values = means.mean(0)
    if accelerator.num_processes > 1:
        values = accelerator.reduce(values.float().to(accelerator.device), "mean").cpu()
    return dict(zip(rows[0], values.tolist(), strict=True))


def _accelerator(device: torch.device, precision: str) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; take bf16 or no on a processor")
    # One process may train with one precision after another; the shared state remembers the first.
    AcceleratorState._reset_state()
    return Accelerator(cpu=device.type == "cpu", mixed_precision=precision)


class Checkpoint:
    """A training's state in one file, written once in a while; does nothing outside `checkpoints`.

    States hold tensors, numbers, texts, lists and dictionaries: they are read without unpickling
    anything else.
    """

    def __init__(self, name: str) -> None:
        folder = _folder.get()
        self.file = (
            None if folder is None else folder / f"{file_part(name.replace(' ', '-'))}.checkpoint"
        )
        self.saved = time.monotonic()

    def restore(self, take: Callable[[dict[str, Any]], None]) -> None:
        """Give the kept state to ``take``, if there is one; UserError if it cannot be taken."""
        if self.file is None or not self.file.is_file():
            return
        try:
            take(torch.load(self.file, map_location="cpu", weights_only=True))
        except Exception as fault:
            raise UserError(
                f"the checkpoint {str(self.file)!r} can't be read or is of another training "
                f"({type(fault).__name__}); remove it to start over"
            ) from fault

    def save(self, state: Callable[[], dict[str, Any]], *, last: bool) -> None:
        """Keep what ``state()`` gives, if it is time to or ``last``."""
        if self.file is None or not (last or time.monotonic() - self.saved > CHECKPOINT_SECONDS):
            return
        buffer = io.BytesIO()
        torch.save(state(), buffer)
        write_atomically(self.file, buffer.getvalue())
        self.saved = time.monotonic()
