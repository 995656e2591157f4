"""The rounds of one shape: dense and a method in turns, compiled dense among them where asked, and
what their passes say, a row a phase."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from dyndepth.common.errors import UserError
from dyndepth.method import DynamicDepthMethod
from dyndepth.runtime.draft_costs import DraftCosts
from dyndepth.timing import drafted, pairing, passes
from dyndepth.timing.compiled import CompiledDense, compiling
from dyndepth.timing.jobs import whole
from dyndepth.timing.latency import held, kept, no_speeds, over_compiled, speeds
from dyndepth.timing.levels import Level, Shape
from dyndepth.timing.pairing import ratio
from dyndepth.timing.passes import How, Side

Row = dict[str, Any]

EXCESS = 0.05
"""A wall speedup above the FLOPs speedup by more than this fraction is marked ``suspect``."""
PROFILED = 3
"""Passes of each side under the profiler, after the timed ones."""


def measured(
    model: nn.Module,
    method: DynamicDepthMethod,
    shape: Shape,
    texts: Sequence[Tensor],
    level: Level,
    how: How,
    compiled_dense: bool,
    seed: int,
    progress: bool,
) -> list[Row]:
    """The rows of one shape: the columns of ``measure.measure`` that are of a phase; decode at each
    of ``drafted.TEMPERATURES`` of a method that speculates.

    Raises UserError as ``check_repeated``."""
    timed = (model, method, shape, texts)
    more = (how, compiled_dense, seed, progress)
    if not (method.speculates and shape.new_tokens):
        return _measured(*timed, level, *more)
    costs = drafted.read_costs(model, method, texts[0][0].tolist(), shape.new_tokens)
    each = replace(level, seconds=level.seconds / len(drafted.TEMPERATURES))
    rows = []
    for temperature in drafted.TEMPERATURES:
        rows += _measured(*timed, each, *more, costs, temperature)
    return rows


def _measured(
    model: nn.Module,
    method: DynamicDepthMethod,
    shape: Shape,
    texts: Sequence[Tensor],
    level: Level,
    how: How,
    compiled_dense: bool,
    seed: int,
    progress: bool,
    costs: DraftCosts | None = None,
    temperature: float = 0.0,
) -> list[Row]:
    """Rows of one shape at one temperature; ``costs`` of the drafts, if there are any."""
    sample = temperature > 0
    stock = whole(model) if how else None
    dense = passes.Side(model, stock, texts, shape.new_tokens, how, sample=sample)
    side: type[Side] = passes.Side if costs is None else drafted.Drafted
    own = side(model, method, texts, shape.new_tokens, how, sample=sample)
    # In graphs, too, a prompt runs eagerly: its time says nothing of them. And a prompt is read
    # alike, however its first token is chosen.
    phases = ("decode",) if how or sample else own.phases
    unrepeated = how["mode"].others if how else 0  # by those that were timed before
    third = None
    with ExitStack() as stack:
        if compiled_dense:
            stack.enter_context(compiling())
            third = CompiledDense(model, texts, shape.new_tokens, sample)
            third.settle()
            stack.enter_context(third.watched())
        pairs = _rounds(dense, own, third, phases, shape, level, how, seed, progress)
    check_repeated(method, how, bool(shape.new_tokens), unrepeated + _verified(own))
    rows = [_row(phase, shape, dense, own, third, pairs) for phase in phases]
    if isinstance(own, drafted.Drafted) and costs is not None:
        _add_drafts(rows[-1], own, costs, temperature, pairs)
    if dense.place.type == "cuda":
        add_busy(rows, dense, own)
    for name, each in (("dense", dense), ("method", own)):
        # By graphs memory lies ready, from the warm-up on.
        found = {} if how else each.peaks()
        for row in rows:
            row |= held(name, found.get(row["phase"]))
    return rows


def _add_drafts(
    row: Row, own: drafted.Drafted, costs: DraftCosts, temperature: float, pairs: int
) -> None:
    """What drafts came to into a row of decode. No FLOPs are saved, so that no efficiency is; what
    it may save at the most is a step a token but for each verification, which is one or more."""
    rounds = [each for one in own.rounds[-pairs:] for each in one]
    assert own.method is not None
    row |= drafted.columns(
        rounds, own.laps(pairs), costs, row["dense_median_s"], temperature, own.method.fit_seconds
    )
    row["wall_efficiency"] = None
    row["suspect"] = row["wall_speedup"] > row["tokens_per_verify"] * (1 + EXCESS)


def _verified(own: Side) -> int:
    """Forwards of several tokens over a cache, which no recording holds."""
    if not isinstance(own, drafted.Drafted):
        return 0
    return sum(bool(each.drafted) for one in own.rounds for each in one)


def _rounds(
    dense: Side,
    own: Side,
    third: CompiledDense | None,
    phases: Sequence[str],
    shape: Shape,
    level: Level,
    how: How,
    seed: int,
    progress: bool,
) -> int:
    """Time the sides in turns; returns in how many rounds, the last of each side's passes."""
    deadline = time.monotonic() + level.seconds
    sides = {"dense": dense, "method": own}
    if third is not None and not third.fault:
        sides["compiled"] = third
    assert own.method is not None
    label = f"{own.method.name}: timing {shape.batch}x{shape.length}"
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

        times = pairing.interleave(
            {name: side.run for name, side in sides.items()},
            around={name: side.around for name, side in sides.items()},
            repeats=level.pairs,
            warmup=warmup(level, dense.texts, dense.place.type, bool(how)),
            seed=seed,
            device=dense.place,
            enough=enough,
            most=level.most,
        )
    return len(times["dense"])


def warmup(level: Level, texts: Sequence[Tensor], device: str, recorded: bool = False) -> int:
    """Rounds before those that are timed, each a whole pass with all its steps: on a GPU every text
    comes up, whose numbers of selected tokens are its own. Where steps are ``recorded``, the first
    round makes the buffers as long as they get, for which recordings over shorter ones are given
    up; the second makes those again."""
    rounds = max(level.warmup, len(texts)) if device == "cuda" else level.warmup
    return max(rounds, 2) if recorded else rounds


def add_busy(rows: Sequence[Row], dense: Side, own: Side) -> None:
    """Busy times and host shares into the rows of one shape, from passes that are not timed."""
    found: dict[str, list[dict[str, float | None]]] = {"dense": [], "method": []}
    for _ in range(PROFILED):
        for name, side in (("dense", dense), ("method", own)):
            with side.around():
                found[name].append(side.busy())
    for row in rows:
        for name, own_passes in found.items():
            known = [each[row["phase"]] for each in own_passes]
            times = [seconds for seconds in known if seconds is not None]
            if times:
                busy = statistics.median(times) / (row["new_tokens"] or 1)
                row[f"{name}_busy_s"] = busy
                row[f"{name}_host_share"] = max(0.0, 1 - busy / row[f"{name}_median_s"])
        if row["dense_busy_s"] and row["method_busy_s"]:
            row["busy_speedup"] = row["dense_busy_s"] / row["method_busy_s"]


def _row(
    phase: str, shape: Shape, dense: Side, own: Side, third: CompiledDense | None, pairs: int
) -> Row:
    """What the last ``pairs`` passes of the sides say about one phase."""
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
        **speeds("dense", phase, shape, first),
        **speeds("method", phase, shape, second),
        **kept("dense", phase, dense.kept[-pairs:]),
        **kept("method", phase, own.kept[-pairs:]),
        **_of_compiled(phase, shape, third, second),
        **drafted.no_columns(),
        "dense_busy_s": None,
        "method_busy_s": None,
        "busy_speedup": None,
        "dense_host_share": None,
        "method_host_share": None,
    }


def _of_compiled(
    phase: str, shape: Shape, third: CompiledDense | None, own: Sequence[float]
) -> Row:
    """Compiled dense beside the method's seconds ``own``; empty if nobody asked for it."""
    if third is None or third.fault:
        return no_speeds("compiled") | over_compiled(None, third.fault if third else "")
    seconds = third.watch.host[phase][-len(own) :]
    return speeds("compiled", phase, shape, seconds) | over_compiled(ratio(seconds, own), "")


def check_repeated(
    method: DynamicDepthMethod, how: How, steps: bool = False, verified: int = 0
) -> None:
    """Raises UserError if what ran by recordings did so in part only, or, where there were
    ``steps``, not at all: the time would be that of eager steps under another name. ``verified``
    forwards over a cache read several tokens, and are no steps."""
    graphs = how.get("mode")
    if graphs is None:
        return
    if graphs.others > verified:
        others = graphs.others - verified
        raise UserError(
            f"{method.name}: {others} decode steps could not be repeated from recordings; "
            "take --mode eager"
        )
    if steps and not graphs.steps:
        raise UserError(
            f"{method.name}: no decode step was repeated from a recording; take --mode eager"
        )
