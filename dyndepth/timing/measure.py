"""Does the saved arithmetic become saved time?

The stock model and the model with a method attached take turns in one process, on the same texts;
a speedup is the median over pairs. Prefill and decode are apart. The FLOPs beside a wall speedup
are those of the very passes that were timed, and the timed passes are made to score documents that
were scored before.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dyndepth.common.errors import RunFailed, UserError
from dyndepth.common.modes import EAGER, GRAPHS, MODES
from dyndepth.data.capacity import longest
from dyndepth.timing.levels import STEPS, Level, Shape, what_fits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dyndepth.data.corpus import Corpus
    from dyndepth.method import DynamicDepthMethod
    from dyndepth.timing.passes import Document


Row = dict[str, Any]

_TOLERANCE = {"float32": (2e-3, 1e-4)}
_COARSE_TOLERANCE = (0.25, 0.05)
"""How far a score may be off, in nats and as a fraction of it: by rounding alone in float32; in
half precision a gate near its threshold may flip when the batch is another."""


def measure(
    model: torch.nn.Module,
    method: DynamicDepthMethod,
    text: Corpus | Tensor,
    *,
    level: str | Level = "quick",
    mode: str = EAGER,
    compiled_dense: bool = False,
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
        compiled_dense: time dense under ``torch.compile`` in the same rounds as well. What fails
            of it is told in the rows, not raised.
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
        over the method's. ``*_ttft_ms``, ``*_tpot_ms`` and ``*_tokens_per_s`` are the same medians
        as latency and throughput, with their 95% intervals; ``*_peak_bytes`` and
        ``*_peak_above_bytes`` the peak memory of one pass more, in ``graphs`` None; and
        ``*_cache_bytes`` the keys and values kept at the end of the phase.
        ``speedup_over_compiled`` is compiled dense's time over the method's, paired as the other;
        None unless asked for, and then ``compiled_error`` says why.
        Of a method that speculates there is one more row of decode: ``temperature`` 1, at which
        dense draws its tokens as well. Its ``acceptance`` is accepted / drafted tokens,
        ``tokens_per_verify`` the tokens written for each verification, ``draft_ms`` and
        ``verify_ms`` a drafted token's and a verification's time, ``predicted_speedup`` and
        ``predicted_by_times`` what the cost model makes of the acceptance, by bytes and by those
        times, ``fit_s`` the seconds of its fit. Shapes of several sequences are
        left out, with a warning, and those of a named level take at least ``levels.STEPS`` steps.
        ``wall_speedup`` is the median over ``repeats`` pairs, with its 95% interval
        ``wall_speedup_low`` to ``wall_speedup_high``. ``block_speedup`` and ``total_speedup`` are
        FLOPs ratios, medians over the same passes, and ``wall_efficiency`` is ``wall_speedup /
        total_speedup`` (None for drafts). ``suspect`` marks a wall speedup above ``total_speedup``
        by more than 5%: the measurement is at fault, or work was saved that the ledger does not
        count (the reading of cached keys in a large batch); for drafts, one above
        ``tokens_per_verify``. ``attach_s`` is what attaching costs, outside of the
        clock. ``reproduces_scores`` says whether ``check`` came out the same (None: nothing to
        check), ``score_gap`` the largest difference in nats, ``check_error`` why there is none.
        The rest are conditions; see dyndepth.common.machine.

    Raises:
        UserError: an unknown level or mode, too little text, a model that has a method attached, or
            in mode ``graphs`` shapes without steps, a model that cannot be recorded, or a method
            some of whose steps cannot be; shapes of several sequences alone for a method that
            speculates.
        RunFailed: the device has no room for any of the shapes. Those that it has no room for, if
            others fit, are left out with a warning.
    """
    import torch

    from dyndepth.common.machine import steady_allocator
    from dyndepth.timing import passes, rounds
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
    if shapes and method.speculates:
        shapes = _one_sequence(shapes, method, longest(model), named=isinstance(level, str))
    if not shapes:
        raise UserError("graphs hold decode steps, and no shape has any; take --mode eager")
    texts = {shape: _texts(text, shape, chosen.texts, seed, model) for shape in shapes}
    with running(mode) as how:
        common: Row = {
            "level": level if isinstance(level, str) else "custom",
            "shapes": "level" if isinstance(level, str) else "asked",
            "mode": mode,
            "attach_s": attach_seconds(model, method, how),
            **_checked(model, method, check, rescore or partial(passes.rescore, how=how)),
            **conditions(model),
        }
        rounds.check_repeated(method, how)
    rows = []
    with torch.inference_mode():
        for shape in shapes:
            found = None
            try:
                with running(mode) as how:
                    found = rounds.measured(
                        *(model, method, shape, texts[shape], chosen, how),
                        *(compiled_dense, seed, progress),
                    )
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


def _one_sequence(
    shapes: Sequence[Shape], method: DynamicDepthMethod, most: int | None, named: bool
) -> list[Shape]:
    """Those of one sequence, which is all that speculation writes at a time, with a warning for the
    others. Shapes of a ``named`` level get steps enough for a few drafts, within ``most`` tokens.
    Raises UserError if none is left.
    """
    alone = [shape for shape in shapes if shape.batch == 1]
    why = f"{method.name} drafts for one sequence after another"
    if not alone:
        raise UserError(f"{why}, and no shape has a batch of 1; add one, such as 1x512")
    if len(alone) < len(shapes):
        others = ", ".join(str(shape) for shape in shapes if shape.batch > 1)
        warnings.warn(f"timing {others} is left out: {why}", stacklevel=3)
    if not named:
        return alone
    room = [STEPS if most is None else min(STEPS, most - shape.length) for shape in alone]
    return [
        shape._replace(new_tokens=max(shape.new_tokens, steps)) if shape.new_tokens else shape
        for shape, steps in zip(alone, room, strict=True)
    ]


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
