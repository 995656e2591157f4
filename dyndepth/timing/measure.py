"""Does the saved arithmetic become saved time?

The stock model and the model with a method attached take turns in one process, on the same texts;
a speedup is the median over pairs. Prefill and decode are apart. The FLOPs beside a wall speedup
are those of the very passes that were timed, and the timed passes are made to score documents that
were scored before.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dyndepth.common.errors import RunFailed, UserError
from dyndepth.common.modes import EAGER, GRAPHS, MODES
from dyndepth.timing.levels import Level, Shape, what_fits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dyndepth.data.corpus import Corpus
    from dyndepth.method import DynamicDepthMethod
    from dyndepth.timing.passes import Document, How, Side


Row = dict[str, Any]

EXCESS = 0.05
"""A wall speedup above the FLOPs speedup by more than this fraction is marked ``suspect``."""
_TOLERANCE = {"float32": (2e-3, 1e-4)}
_COARSE_TOLERANCE = (0.25, 0.05)
"""How far a score may be off, in nats and as a fraction of it: by rounding alone in float32; in
half precision a gate near its threshold may flip when the batch is another."""
PROFILED = 3
"""Passes of each side under the profiler, after the timed ones."""


def measure(
    model: torch.nn.Module,
    method: DynamicDepthMethod,
    text: Corpus | Tensor,
    *,
    level: str | Level = "quick",
    mode: str = EAGER,
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
        level: ``quick``, ``full``, or a Level. Of a named one, shapes that are longer than the
            model takes are left out, with a warning.
        mode: ``eager``, or ``graphs``: both sides decode through CUDA graphs. Prompts run eagerly
            there as well, so that decode alone has rows, of the shapes that have steps.
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
        host's clock; ``*_busy_s`` the part of as much work in which the device computes or copies,
        of further passes under a profiler; ``*_host_share`` what that leaves of the time: the
        device waits for the host; None on a CPU, all of them. ``busy_speedup`` is dense's busy time
        over the method's.
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
        UserError: an unknown level or mode, too little text, a model that has a method attached, or
            in mode ``graphs`` shapes without steps, a model that cannot be recorded, or a method
            some of whose steps cannot be.
        RunFailed: the device has no room for any of the shapes. Those that it has no room for, if
            others fit, are left out with a warning.
    """
    import torch

    from dyndepth.common.machine import steady_allocator
    from dyndepth.timing import passes
    from dyndepth.timing.conditions import conditions
    from dyndepth.timing.passes import attach_seconds, running

    device = next(model.parameters()).device.type
    if mode not in MODES:
        raise UserError(f"timing mode {mode!r} is none of {', '.join(MODES)}")
    chosen, longer = what_fits(model, level, device)
    for shape in longer:
        warnings.warn(f"timing {shape} is left out: the model takes fewer tokens", stacklevel=2)
    if device == "cpu":
        steady_allocator()
    shapes = [shape for shape in chosen.shapes if shape.new_tokens or mode != GRAPHS]
    if not shapes:
        raise UserError("graphs hold decode steps, and no shape has any; take --mode eager")
    texts = {shape: _texts(text, shape, chosen.texts, seed, model) for shape in shapes}
    with running(mode) as how:
        common: Row = {
            "level": level if isinstance(level, str) else "custom",
            "mode": mode,
            "attach_s": attach_seconds(model, method, how),
            **_checked(model, method, check, rescore or partial(passes.rescore, how=how)),
            **conditions(model),
        }
        _check_repeated(method, how)
    rows = []
    with torch.inference_mode():
        for shape in shapes:
            found = None
            try:
                with running(mode) as how:
                    found = _pairs(model, method, shape, texts[shape], chosen, how, seed, progress)
            except torch.OutOfMemoryError:
                pass
            if found is None:
                # Here, where the failed pass's tensors are no longer held by its traceback.
                warnings.warn(f"timing {shape} is left out: the memory is too small", stacklevel=2)
                gc.collect()
                torch.cuda.empty_cache()
            rows += found or []
    if not rows:
        raise RunFailed("the device's memory is too small for every shape that was to be timed")
    return [row | common for row in rows]


def in_modes(
    modes: Sequence[str],
    asked: str | None,
    timed: Callable[[str], list[Row]],
    stands: bool = False,
) -> list[Row]:
    """The rows that ``timed`` gives in each of the ``modes``. If nobody ``asked`` for one, a mode
    that the model or the memory does not allow is left out, with a warning, where another
    ``stands`` or was timed before.
    """
    rows: list[Row] = []
    for mode in modes:
        try:
            rows += timed(mode)
        except (UserError, RunFailed) as fault:
            if asked is not None or not (rows or stands):
                raise
            warnings.warn(f"timing in {mode} mode is left out: {fault}", stacklevel=2)
    return rows


def check_recordable(model: torch.nn.Module, asked: str | None) -> None:
    """Raises UserError if a mode with graphs was ``asked`` for and no step of the model can be
    recorded: said before any work, not after it."""
    if asked in (None, EAGER):
        return
    from dyndepth.models.blocks import Decoder
    from dyndepth.runtime.graphs import obstacle

    reason = obstacle(Decoder.of(model))
    if reason is not None:
        raise UserError(f"graphs cannot be recorded: {reason}; take --mode eager")


def _check_repeated(method: DynamicDepthMethod, how: How, steps: bool = False) -> None:
    """Raises UserError if what ran by recordings did so in part only, or, where there were
    ``steps``, not at all: the time would be that of eager steps under another name."""
    graphs = how.get("mode")
    if graphs is None:
        return
    if graphs.others:
        raise UserError(
            f"{method.name}: {graphs.others} decode steps could not be repeated from recordings; "
            "take --mode eager"
        )
    if steps and not graphs.steps:
        raise UserError(
            f"{method.name}: no decode step was repeated from a recording; take --mode eager"
        )


def _texts(
    text: Corpus | Tensor, shape: Shape, count: int, seed: int, model: torch.nn.Module
) -> list[Tensor]:
    """Up to ``count`` batches ``[batch, length]`` on the model's device, at least one."""
    import torch

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
    how: How,
    seed: int,
    progress: bool,
) -> list[Row]:
    """The rows of one shape."""
    from tqdm import tqdm

    from dyndepth.timing.jobs import whole
    from dyndepth.timing.pairing import interleave, ratio
    from dyndepth.timing.passes import Side

    dense = Side(model, whole(model) if how else None, texts, shape.new_tokens, how)
    own = Side(model, method, texts, shape.new_tokens, how)
    # In graphs, too, a prompt runs eagerly: its time says nothing of them.
    phases = ("decode",) if how else own.phases
    deadline = time.monotonic() + level.seconds
    label = f"{method.name}: timing {shape.batch}x{shape.length}"
    with tqdm(desc=label, unit=" pairs", disable=not progress, leave=False) as bar:

        def enough(times: dict[str, list[float]]) -> bool:
            n = len(times["dense"])
            found = [
                ratio(dense.watch.host[phase][-n:], own.watch.host[phase][-n:]) for phase in phases
            ]
            margin = max(each.margin for each in found)
            bar.set_postfix_str(f"±{margin:.1%}", refresh=False)
            bar.update(n - bar.n)
            return margin <= level.precision or time.monotonic() > deadline

        times = interleave(
            {"dense": dense.run, "method": own.run},
            around={"dense": dense.around, "method": own.around},
            repeats=level.pairs,
            warmup=_warmup(level, texts, dense.place.type, bool(how)),
            seed=seed,
            device=dense.place,
            enough=enough,
            most=level.most,
        )
    _check_repeated(method, how, steps=bool(shape.new_tokens))
    pairs = len(times["dense"])
    rows = [_row(phase, shape, dense, own, pairs) for phase in phases]
    if dense.place.type == "cuda":
        _add_busy(rows, dense, own)
    return rows


def _warmup(level: Level, texts: Sequence[Tensor], device: str, recorded: bool = False) -> int:
    """Rounds before those that are timed, each a whole pass with all its steps: on a GPU every text
    comes up, whose numbers of selected tokens are its own. Where steps are ``recorded``, the first
    round makes the buffers as long as they get, for which recordings over shorter ones are given
    up; the second makes those again."""
    rounds = max(level.warmup, len(texts)) if device == "cuda" else level.warmup
    return max(rounds, 2) if recorded else rounds


def _add_busy(rows: Sequence[Row], dense: Side, own: Side) -> None:
    """Busy times and host shares into the rows of one shape, from passes that are not timed."""
    found: dict[str, list[dict[str, float | None]]] = {"dense": [], "method": []}
    for _ in range(PROFILED):
        for name, side in (("dense", dense), ("method", own)):
            with side.around():
                found[name].append(side.busy())
    for row in rows:
        for name, passes in found.items():
            known = [each[row["phase"]] for each in passes]
            times = [seconds for seconds in known if seconds is not None]
            if times:
                busy = statistics.median(times) / (row["new_tokens"] or 1)
                row[f"{name}_busy_s"] = busy
                row[f"{name}_host_share"] = max(0.0, 1 - busy / row[f"{name}_median_s"])
        if row["dense_busy_s"] and row["method_busy_s"]:
            row["busy_speedup"] = row["dense_busy_s"] / row["method_busy_s"]


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
    return {
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
        "dense_busy_s": None,
        "method_busy_s": None,
        "busy_speedup": None,
        "dense_host_share": None,
        "method_host_share": None,
    }


def _checked(
    model: torch.nn.Module,
    method: DynamicDepthMethod,
    check: Sequence[Document] | None,
    rescore: Callable[..., Sequence[float]],
) -> Row:
    """Whether ``check`` is scored alike by what is about to be timed. A failure is told, not
    raised: the times stand, marked."""
    from dyndepth.models.rotary import one_table

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
        found = list(rescore(model, method, check))
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
