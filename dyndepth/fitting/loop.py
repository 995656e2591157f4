"""The optimisation loop that all training here shares.

It knows nothing of routers or adapters: it is given an objective and parameters. Accelerate brings
mixed precision and several devices. A run that is killed goes on from its last checkpoint with the
same curve: windows are a function of the step, and so is all randomness. The host waits for no
step: its numbers are read when the next one is queued, and before anything is kept.
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
from dyndepth.fitting.filling import Filling, memory_of
from dyndepth.fitting.readings import BAR, Reading, Row, Speed
from dyndepth.models.seeding import seeded

if TYPE_CHECKING:
    from dyndepth.data.corpus import Windows


Curve = list[dict[str, float]]
Objective = Callable[[Tensor, int], tuple[Tensor, Row]]
"""``(ids [batch, length], step) -> (loss to minimise, what the curve records)``.

The loss is a mean over the windows. Where a device takes several micro-batches as one, ``ids`` has
the windows of all.
"""

CHECKPOINT_SECONDS = float(os.environ.get("DYNDEPTH_CHECKPOINT_SECONDS", "60"))
_folder: ContextVar[Path | None] = ContextVar("checkpoints", default=None)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how hard to train.

    ``steps`` of the optimiser (AdamW), each over ``accumulate`` micro-batches of ``batch`` windows
    of ``length`` tokens in every process; a GPU may compute several of them as one, see
    ``optimise``. Rates rise linearly over the share ``warm_up`` of all
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

    On a GPU, micro-batches are merged as far as its memory allows, but for those of the first step,
    which is measured. The gradient of a mean over windows is the same up to rounding. What an
    objective draws at random is drawn once for those that are merged, seeded as the first of them,
    and what it makes of means over a micro-batch (a distance from a budget) it makes of theirs.

    Raises UserError if there are too few windows, FloatingPointError if the loss is not a number:
    the parameters have then taken up to two steps with it, and no checkpoint holds them.
    """
    if len(windows) < schedule.windows:
        raise UserError(f"training reads {schedule.windows} windows, {len(windows)} were given")
    parameters = [p for group in groups for p in group["params"]]
    device = parameters[0].device
    accelerator = _accelerator(device, schedule.precision)
    optimiser = torch.optim.AdamW(
        list(groups), weight_decay=schedule.weight_decay, betas=(0.9, 0.99)
    )
    rates = [group["lr"] for group in optimiser.param_groups]
    filling = Filling(schedule.accumulate, memory_of(device))
    curve: Curve = []

    def state() -> dict[str, Any]:
        values = [parameter.detach().cpu() for parameter in parameters]
        kept: dict[str, Any] = {"parameters": values, "optimiser": optimiser.state_dict()}
        kept |= {"curve": curve, "together": filling.together}
        scaler = accelerator.scaler
        return kept | ({"scaler": scaler.state_dict()} if scaler is not None else {})

    def take(kept: dict[str, Any]) -> None:
        for parameter, value in zip(parameters, kept["parameters"], strict=True):
            parameter.data.copy_(value)
        optimiser.load_state_dict(kept["optimiser"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(kept["scaler"])
        if filling.together is None:
            filling.together = kept["together"]
        curve.extend(kept["curve"])

    checkpoint = Checkpoint(name)
    checkpoint.restore(take)
    stepper = accelerator.prepare_optimizer(optimiser)
    processes, rank = accelerator.num_processes, accelerator.process_index

    def backward(step: int) -> Reading:
        """Queue the gradients of one step, and the reading of its numbers."""
        together = list(filling.groups())
        rows, losses = [], []
        for group in together:
            indices = [(step * schedule.accumulate + part) * processes + rank for part in group]
            ids = _sent(windows, indices, schedule.batch, device)
            with seeded(seed * 1_000_003 + indices[0], device), accelerator.autocast():
                loss, row = objective(ids, step)
            accelerator.backward(loss / len(together))
            rows.append(row)
            losses.append(loss.detach())
        filling.done()
        return Reading(step, rows, losses, accelerator)

    def queue(step: int) -> Reading:
        """Queue one step, with fewer micro-batches at a time if memory is short."""
        while True:
            try:
                reading = backward(step)
                break
            except torch.OutOfMemoryError:
                if not filling.less():
                    raise
            # Only now, when the exception no longer holds what the step had made.
            filling.release()
            stepper.zero_grad()
        if processes > 1:
            for parameter in parameters:
                # A process in which it took no part must still answer the others.
                own = parameter.grad
                own = torch.zeros_like(parameter) if own is None else own
                parameter.grad = accelerator.reduce(own, "mean")
        stepper.step()
        stepper.zero_grad()
        return reading

    bar = tqdm(
        total=schedule.steps,
        initial=len(curve),
        desc=name,
        unit=" step",
        bar_format=BAR,
        disable=not (progress and accelerator.is_main_process),
    )
    a_step = schedule.accumulate * processes * schedule.batch * windows[:1].shape[1]
    speed = Speed(len(curve) * a_step)
    waiting: list[Reading] = []

    def read() -> None:
        """Complete the curve by the steps that are waited for."""
        while waiting:
            try:
                row = waiting.pop(0).row()
            except FloatingPointError as fault:
                raise FloatingPointError(f"{name}: {fault}") from None
            curve.append(row | {"tokens": float((len(curve) + 1) * a_step)})
            shown = [f"{key} {value:.3f}" for key, value in row.items()]
            bar.set_postfix_str(
                ", ".join([*shown, speed.after(curve[-1]["tokens"])]), refresh=False
            )
            bar.update()

    with bar:
        for step in range(len(curve), schedule.steps):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * schedule.rate(step)
            reading = queue(step)
            read()
            waiting.append(reading)
            last = step + 1 == schedule.steps
            if accelerator.is_main_process and checkpoint.due(last=last):
                read()
                checkpoint.save(state, last=last)
        read()
    return curve


def _sent(
    windows: Tensor | Windows, indices: Sequence[int], batch: int, device: torch.device
) -> Tensor:
    """The windows of the micro-batches ``indices``, on ``device`` without a wait."""
    parts = [windows[index * batch : (index + 1) * batch] for index in indices]
    ids = torch.cat(parts) if len(parts) > 1 else parts[0]
    if device.type == "cuda" and ids.device.type == "cpu":
        ids = ids.pin_memory()
    return ids.to(device, non_blocking=True)


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

    def due(self, *, last: bool) -> bool:
        """Whether ``save`` would keep a state now."""
        waited = time.monotonic() - self.saved
        return self.file is not None and (last or waited > CHECKPOINT_SECONDS)

    def save(self, state: Callable[[], dict[str, Any]], *, last: bool) -> None:
        """Keep what ``state()`` gives, if it is time to or ``last``."""
        if self.file is None or not self.due(last=last):
            return
        buffer = io.BytesIO()
        torch.save(state(), buffer)
        write_atomically(self.file, buffer.getvalue())
        self.saved = time.monotonic()
