"""Does the saved arithmetic become saved time?

The stock model and the model with a method attached take turns in one process, on the same texts;
a speedup is the median over pairs. Prefill and decode are apart. The FLOPs beside a wall speedup
are those of the very passes that were timed, and the timed passes are made to score documents that
were scored before.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dyndepth.data.capacity import check_length

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dyndepth.data.corpus import Corpus
    from dyndepth.method import DynamicDepthMethod
    from dyndepth.timing.passes import Document, Side


Row = dict[str, Any]

EXCESS = 0.05
"""A wall speedup above the FLOPs speedup by more than this fraction is marked ``suspect``."""
_TOLERANCE = {"float32": (2e-3, 1e-4)}
_COARSE_TOLERANCE = (0.25, 0.05)
"""How far a score may be off, in nats and as a fraction of it: by rounding alone in float32; in
half precision a gate near its threshold may flip when the batch is another."""


@dataclass(frozen=True)
class Shape:
    """A batch of prompts of ``length`` tokens, each continued by ``new_tokens`` steps."""

    batch: int
    length: int
    new_tokens: int


@dataclass(frozen=True)
class Level:
    """How thoroughly is timed.

    Attributes:
        shapes: what is timed.
        texts: different batches of text that a shape cycles through.
        pairs: the least number a shape.
        most: the largest.
        warmup: the least number of rounds before them.
        precision: a shape is done when the intervals of both phases reach this margin.
        seconds: or when, after the least number of pairs, this time is over; warm-up included.
    """

    shapes: tuple[Shape, ...]
    texts: int
    pairs: int
    most: int
    warmup: int
    precision: float
    seconds: float


LEVELS = {
    "quick": Level((Shape(1, 64, 2), Shape(4, 32, 2)), 6, 6, 15, 1, 0.03, 4.0),
    "full": Level((Shape(1, 512, 32), Shape(8, 256, 16)), 8, 9, 400, 2, 0.03, 900.0),
}


def measure(
    model: torch.nn.Module,
    method: DynamicDepthMethod,
    text: Corpus | Tensor,
    *,
    level: str | Level = "quick",
    seed: int = 0,
    check: Sequence[Document] | None = None,
    rescore: Callable[..., Sequence[float]] | None = None,
    progress: bool = True,
) -> list[Row]:
    """Time ``method`` against the stock model; one row a phase and shape.

    Args:
        model: not attached.
        method: fitted.
        text: a corpus, or windows of token ids, int64 ``[count, length]``. Real text: token
            methods route by it.
        level: ``quick``, ``full``, or a Level.
        seed: of the windows and of the order within the pairs.
        check: documents that were scored before, (context ids, continuation ids, log-likelihood)
            and the document's id where the method depends on it. Those that the model reads by
            other rotary tables as they grow are left out: no cache can serve them.
        rescore: ``rescore(model, method, check)`` gives their log-likelihoods anew; by default
            the timed passes do.
        progress: show a progress bar.

    Returns:
        Rows of timing.csv without the cell's identity. Times are medians, in seconds, of one pass
        in phase ``prefill``, of one step in phase ``decode``: ``*_median_s`` end to end by the
        host's clock, ``*_device_s`` between CUDA events (None on a CPU).
        ``wall_speedup`` is the median over ``repeats`` pairs, with its 95% interval
        ``wall_speedup_low`` to ``wall_speedup_high``. ``block_speedup`` and ``total_speedup`` are
        FLOPs ratios, medians over the same passes, and ``wall_efficiency`` is ``wall_speedup /
        total_speedup``. ``suspect`` marks a wall speedup above ``total_speedup`` by more than 5%:
        the measurement is at fault, or work was saved that the ledger does not count (the reading
        of cached keys in a large batch). ``attach_s`` is what attaching costs, outside of the
        clock. ``reproduces_scores`` says whether ``check`` came out the same (None: nothing to
        check), ``score_gap`` the largest difference in nats, ``check_error`` why there is none.
        The rest are conditions; see dyndepth.common.machine.

    Raises:
        UserError: an unknown level, too little text, or a model that has a method attached.
    """
    import torch

    from dyndepth.common.machine import steady_allocator
    from dyndepth.timing.conditions import conditions
    from dyndepth.timing.passes import attach_seconds

    chosen = _level(level)
    if next(model.parameters()).device.type == "cpu":
        steady_allocator()
    check_shapes(model, chosen)
    texts = {shape: _texts(text, shape, chosen.texts, seed, model) for shape in chosen.shapes}
    common: Row = {
        "level": level if isinstance(level, str) else "custom",
        "attach_s": attach_seconds(model, method),
        **_checked(model, method, check, rescore),
        **conditions(model),
    }
    rows = []
    with torch.inference_mode():
        for shape in chosen.shapes:
            rows += _pairs(model, method, shape, texts[shape], chosen, seed, progress)
    return [row | common for row in rows]


def check_shapes(model_or_most: Any, level: str | Level) -> None:
    """Raises UserError for a level that times more tokens than fit; see ``check_length``."""
    for shape in _level(level).shapes:
        check_length(
            model_or_most,
            shape.length + shape.new_tokens,
            f"timing {shape.batch} x {shape.length} + {shape.new_tokens}",
            "take a longer model, another level, or none (--timing off)",
        )


def _level(level: str | Level) -> Level:
    from dyndepth.common.errors import UserError

    if isinstance(level, Level):
        return level
    if level not in LEVELS:
        raise UserError(f"timing level {level!r} is none of {', '.join(LEVELS)}")
    return LEVELS[level]


def _texts(
    text: Corpus | Tensor, shape: Shape, count: int, seed: int, model: torch.nn.Module
) -> list[Tensor]:
    """Up to ``count`` batches ``[batch, length]`` on the model's device, at least one."""
    import torch

    from dyndepth.common.errors import UserError

    if isinstance(text, torch.Tensor):
        windows = text
    else:
        windows = text.windows(shape.length, shape.batch * count, seed=seed, model=model)
    if windows.ndim != 2 or windows.shape[0] < shape.batch or windows.shape[1] < shape.length:
        raise UserError(
            f"timing needs {shape.batch} windows of {shape.length} tokens, "
            f"and the windows given are {' x '.join(map(str, windows.shape))}"
        )
    whole = windows[: len(windows) // shape.batch * shape.batch, : shape.length]
    device = next(model.parameters()).device
    return [part.to(device) for part in whole.split(shape.batch)[:count]]


def _pairs(
    model: torch.nn.Module,
    method: DynamicDepthMethod,
    shape: Shape,
    texts: list[Tensor],
    level: Level,
    seed: int,
    progress: bool,
) -> list[Row]:
    """The rows of one shape."""
    from tqdm import tqdm

    from dyndepth.timing.pairing import interleave, ratio
    from dyndepth.timing.passes import PHASES, Side

    dense = Side(model, None, texts, shape.new_tokens)
    own = Side(model, method, texts, shape.new_tokens)
    deadline = time.monotonic() + level.seconds
    label = f"{method.name}: timing {shape.batch}x{shape.length}"
    with tqdm(desc=label, unit=" pairs", disable=not progress, leave=False) as bar:

        def enough(times: dict[str, list[float]]) -> bool:
            n = len(times["dense"])
            found = [ratio(dense.watch.host[p][-n:], own.watch.host[p][-n:]) for p in PHASES]
            margin = max(each.margin for each in found)
            bar.set_postfix_str(f"±{margin:.1%}", refresh=False)
            bar.update(n - bar.n)
            return margin <= level.precision or time.monotonic() > deadline

        times = interleave(
            {"dense": dense.run, "method": own.run},
            around={"dense": dense.around, "method": own.around},
            repeats=level.pairs,
            warmup=level.warmup,
            seed=seed,
            device=dense.place,
            enough=enough,
            most=level.most,
        )
    pairs = len(times["dense"])
    return [_row(phase, shape, dense, own, pairs) for phase in PHASES]


def _row(phase: str, shape: Shape, dense: Side, own: Side, pairs: int) -> Row:
    """What the last ``pairs`` passes of both sides say about one phase."""
    from dyndepth.timing.pairing import ratio

    steps = shape.new_tokens if phase == "decode" else 1
    first, second = dense.watch.host[phase][-pairs:], own.watch.host[phase][-pairs:]
    wall = ratio(first, second)
    totals = [totals[phase] for totals in own.totals[-pairs:]]
    ideal = {
        kind: statistics.median(
            each[f"dense_{kind}_flops"] / each[f"{kind}_flops"] for each in totals
        )
        for kind in ("block", "total")
    }
    row = {
        "phase": phase,
        "batch": shape.batch,
        "length": shape.length,
        "new_tokens": shape.new_tokens if phase == "decode" else 0,
        "dense_median_s": statistics.median(first) / steps,
        "method_median_s": statistics.median(second) / steps,
        "wall_speedup": wall.median,
        "wall_speedup_low": wall.low,
        "wall_speedup_high": wall.high,
        "repeats": wall.n,
        "block_speedup": ideal["block"],
        "total_speedup": ideal["total"],
        "wall_efficiency": wall.median / ideal["total"],
        "suspect": wall.median > ideal["total"] * (1 + EXCESS),
        "dense_device_s": None,
        "method_device_s": None,
        "device_speedup": None,
    }
    on_device = dense.watch.device[phase][-pairs:], own.watch.device[phase][-pairs:]
    if all(on_device):
        row |= {
            "dense_device_s": statistics.median(on_device[0]) / steps,
            "method_device_s": statistics.median(on_device[1]) / steps,
            "device_speedup": ratio(*on_device).median,
        }
    return row


def _checked(
    model: torch.nn.Module,
    method: DynamicDepthMethod,
    check: Sequence[Document] | None,
    rescore: Callable[..., Sequence[float]] | None,
) -> Row:
    """Whether ``check`` is scored alike by what is about to be timed. A failure is told, not
    raised: the times stand, marked."""
    from dyndepth.models.rotary import one_table
    from dyndepth.timing import passes

    row: Row = {"reproduces_scores": None, "score_gap": None, "check_error": None}
    # A document that is read by other tables as it grows was not scored over a cache.
    check = [
        each
        for each in check or ()
        if one_table(model, len(each[0]), len(each[0]) + len(each[1]) - 1)
    ]
    if not check:
        return row
    try:
        found = list((rescore or passes.rescore)(model, method, check))
        gaps = [abs(new - document[2]) for new, document in zip(found, check, strict=True)]
        if not all(map(math.isfinite, gaps)):
            raise FloatingPointError("a log-likelihood is not a number")
    except Exception as fault:  # noqa: BLE001 - whatever fails, it is the row that must say so
        message = f"{type(fault).__name__}: {fault}"
        warnings.warn(f"{method.name}: the timed model could not score: {message}", stacklevel=3)
        return row | {"reproduces_scores": False, "check_error": " ".join(message.split())}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    nats, fraction = _TOLERANCE.get(dtype, _COARSE_TOLERANCE)
    agree = all(
        gap <= nats + fraction * abs(document[2]) for gap, document in zip(gaps, check, strict=True)
    )
    return row | {"reproduces_scores": agree, "score_gap": max(gaps)}
