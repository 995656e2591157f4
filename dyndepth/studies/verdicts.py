"""What the cells of a study say about its claims: one row a comparison, with a verdict.

Which cells may stand against each other is decided here; the statistics are in
``dyndepth.results.statistics.curves``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from dyndepth.cells.cell import DENSE, Cell, method_identity, order
from dyndepth.cells.identity import Row, flat, plain, setting
from dyndepth.cells.merging import check_comparable
from dyndepth.cells.store import Store
from dyndepth.common.digests import harness_code
from dyndepth.common.errors import UserError
from dyndepth.common.provenance import versions
from dyndepth.method import SUBLAYERS
from dyndepth.results.statistics.curves import (
    SAME,
    Point,
    curve,
    interpolate,
    measured,
    of_modules,
)
from dyndepth.results.statistics.differences import Difference, difference, reach
from dyndepth.results.statistics.intervals import LEAST
from dyndepth.results.statistics.verdicts import direction, holm
from dyndepth.studies import acceptance, recordings, similarity
from dyndepth.studies.study import Claim, Pick, Study
from dyndepth.sweep.grid import limits
from dyndepth.sweep.settings import Settings, chat_of, limit_text

COLUMNS = (
    *("study", "claim", "source", "published", "kind", "task", "metric", "higher_is_better"),
    *("a", "b"),
    *("target_speedup", "fraction_a", "fraction_b", "value_a", "value_b", "difference"),
    *("low", "high", "p", "p_holm", "n", "unit", "seeds_a", "seeds_b", "verdict", "reason"),
    *("cells_a", "cells_b", "model", "model_fingerprint", "data_fingerprint", "task_version"),
    *("device", "dtype", "torch", "transformers", "dyndepth", "harness_code", "git_commit"),
)
"""Columns of claims.csv: one row a claim, opponent, task and budget of A. ``fraction_a`` is A's
executed / dense block FLOPs (all FLOPs for ``equal_total_flops``, sublayers for
``equal_modules``), ``fraction_b`` where B's value stands (interpolated to A's);
``difference`` = A - B with its 95% interval ``low`` to ``high``, not adjusted; ``p_holm`` is
adjusted for all comparisons of the claim; ``n`` counts what was resampled (``unit``). ``published``
is the number that the source gives. For ``reach``, ``value_a`` is the share of dense's block FLOPs
that was looked for, and ``low`` to ``high`` its interval."""

VERDICTS = ("better", "worse", "no difference shown", "not comparable")

INTERPOLATED = ("equal_flops", "equal_total_flops", "equal_modules", "similarity", "acceptance")
"""Kinds of claims whose B is interpolated to A's budget."""

COUNTED = {
    "equal_modules": "sublayers",
    "equal_total_flops": "FLOPs",
    "acceptance": "block FLOPs, in its drafts,",
}
"""What a budget counts, where that is not the FLOPs of the blocks."""

RECORDED = {
    "similarity": "similarity",
    "acceptance": "acceptance",
    "transfer": "acceptance",
    "identical": "acceptance",
}
"""Kinds of claims that compare what was recorded of the cells, and what that is."""

ROUTED = ("sublayers", "position")
"""Kinds of claims that compare executed fractions within one method."""

SLACK = 0.005
"""Share of dense's block FLOPs by which A may lie beyond B's curve. A control whose budget is
matched to A's misses it by the noise of its draws, to either side."""


def comparable(store: Store, settings: Settings) -> list[Cell]:
    """The cells of a run that were scored as ``settings`` say, by one version of the harness.

    Raises:
        UserError: there are none; or they are of different data, task versions or conditions.
    """
    from dyndepth.tasks import resolve

    tasks = resolve(settings.tasks, settings.include_path)
    limit = limits(settings, tasks)
    wanted: dict[str, Any] = {"tasks": list(tasks), "limit": limit, "dtype": settings.dtype}
    wanted |= {key: getattr(settings, key) for key in ("sample_seed", "batch_size")}
    wanted |= chat_of(settings).asked()
    if settings.num_fewshot is not None:
        wanted["num_fewshot"] = settings.num_fewshot
    cells = store.all()
    found = [cell for cell in cells if all(_same(cell, key, wanted[key]) for key in wanted)]
    if not found:
        others = " or ".join(sorted({flat(cell.identity["limit"]) for cell in cells}))
        raise UserError(
            f"{store.path} holds no cells scored with --limit {limit_text(settings.limit)}; "
            + (f"its cells have {others}" if others else "run the study without --only_report")
        )
    check_comparable(found)
    return _one_version(
        found,
        lambda cell: setting(cell.identity),
        {"harness_code": harness_code(), **versions()},
        f"{store.path} holds cells of several versions or conditions",
    )


def chosen(pick: Pick, cells: Sequence[Cell], phases: str) -> list[Cell]:
    """The cells of ``pick``, failed ones included, in the order of the tables.

    Raises:
        UserError: an unknown method or parameter; cells of several versions of its code.
    """
    from dyndepth.common.registry import load_method, parse_methods, phases_given

    ((name, given),) = parse_methods(pick.method)
    method = load_method(pick.method, **phases_given(name, given, phases))
    own = method_identity(method, pick.recipe)
    keys = ("method", "parameters", "phases", "recovery")
    found = [cell for cell in cells if all(_same(cell, key, own[key]) for key in keys)]
    code = {key: own[key] for key in ("method_code", "fit_version")}
    versioned = ("method_code", "fit_version", "corpus_fingerprint")
    return _one_version(
        sorted(found, key=order),
        lambda cell: str([cell.identity[key] for key in versioned]),
        code,
        f"{pick.label} has cells of several versions of its code or several corpora",
    )


def label(pick: Pick) -> str:
    """How rows call a pick: a bound says that it is one, and what is lossless."""
    from dyndepth.common.registry import load_method

    method = load_method(pick.method)
    kind = " (bound)" if method.uses_labels else " (lossless)" if method.speculates else ""
    return pick.label + kind


def _saves_nothing(claim: Claim, picks: Iterable[Pick]) -> str:
    """Why a claim about FLOPs cannot be judged: which of its picks save none; empty if it can, and
    of claims about drafts themselves."""
    from dyndepth.common.registry import load_method

    if RECORDED.get(claim.kind) == "acceptance":
        return ""
    names = [pick.label for pick in picks if load_method(pick.method).speculates]
    if not names:
        return ""
    return f"{' and '.join(names)} drafts what the whole model verifies and saves no FLOPs"


def report(study: Study, cells: Sequence[Cell], phases: str, folder: Path) -> list[Row]:
    """Rows of claims.csv for ``cells`` of the run in ``folder``.

    Raises UserError as ``chosen`` and ``curves.measured`` do.
    """
    rows = []
    for claim in study.claims:
        about = {"study": study.name, "source": claim.source, "published": claim.published}
        if claim.kind == "reach":
            found = list(_reached(claim, cells, phases))
        elif claim.kind == "identical":
            found = list(_identical(claim, cells, phases, folder))
        elif claim.kind in ROUTED:
            found = list(_judged(claim, list(_routed(claim, cells, phases, folder))))
        else:
            found = list(_judged(claim, list(_methods(claim, cells, phases, folder))))
        rows += [about | row for row in found]
    for row in rows:
        # What all cells share; a row that found no cell of its own has no target either.
        shared = {key: cells[0].identity[key] for key in COLUMNS if key in cells[0].identity}
        row |= shared | {"target_speedup": None} | row
    return rows


def traced(study: Study, cells: Sequence[Cell], phases: str) -> list[Cell]:
    """The cells whose routing traces the claims need."""
    claims = [claim for claim in study.claims if claim.kind in ROUTED]
    found = {cell.key: cell for each in claims for cell in chosen(each.a, cells, phases)}
    return [cell for cell in found.values() if cell.evaluated]


def likened(study: Study, cells: Sequence[Cell], phases: str) -> list[Cell]:
    """The cells whose final hidden states the claims compare with dense's."""
    claims = [claim for claim in study.claims if claim.kind == "similarity"]
    picks = dict.fromkeys(pick for claim in claims for pick in (Pick(DENSE), claim.a, *claim.b))
    found = {cell.key: cell for pick in picks for cell in chosen(pick, cells, phases)}
    return [cell for cell in found.values() if cell.evaluated]


def drafting(study: Study, cells: Sequence[Cell], phases: str, *kinds: str) -> list[Cell]:
    """The cells whose drafts claims of these ``kinds`` need."""
    claims = [claim for claim in study.claims if claim.kind in kinds]
    picks = dict.fromkeys(pick for claim in claims for pick in (claim.a, *claim.b))
    found = {cell.key: cell for pick in picks for cell in chosen(pick, cells, phases)}
    return [cell for cell in found.values() if cell.evaluated]


def failures(study: Study, cells: Sequence[Cell], phases: str) -> list[Cell]:
    """Failed cells that a claim of the study needs."""
    picks = {pick for claim in study.claims for pick in (claim.a, *claim.b)}
    found = {cell.key: cell for pick in picks for cell in chosen(pick, cells, phases)}
    return [cell for cell in found.values() if cell.status == "error"]


def _methods(
    claim: Claim, cells: Sequence[Cell], phases: str, folder: Path
) -> Iterator[tuple[Row, Any]]:
    similar = claim.kind == "similarity"
    metrics = (("wikipedia passages", similarity.METRIC),) if similar else claim.metrics
    for b, (task, metric) in product(claim.b, metrics):
        row: Row = {"task": task, "metric": metric, "b": label(b), "unit": "documents"}

        def points(
            pick: Pick, task: str = task, metric: str = metric, kind: str = claim.kind
        ) -> dict[float, Point]:
            return _points(claim, pick, cells, phases, task, metric, folder, kind)

        if saved := _saves_nothing(claim, (claim.a, b)):
            yield row, saved
            continue
        own, other = points(claim.a), points(b)
        if claim.kind == "transfer":
            other = points(b, kind="acceptance")
            own = {target: point for target, point in own.items() if target in other}
        missing = [p.label for p, found in ((claim.a, own), (b, other)) if not found]
        if missing:
            what = "finished cell"
            if claim.kind in RECORDED:
                what = f"{RECORDED[claim.kind]} recorded"
            yield row, f"no {what} of {' and of '.join(missing)}"
            continue
        recorded = claim.kind in RECORDED
        row |= {"higher_is_better": True} if recorded else _of_task(cells, task, metric)
        if claim.kind == "transfer":
            # The same cells, fitted on other text.
            for target, point in own.items():
                yield _against(claim, row, target, point, [other[target]])
            continue
        against = curve(list(other.values()))
        if claim.kind == "acceptance":
            against = curve([*other.values(), acceptance.whole(next(iter(other.values())))])
        elif claim.kind in INTERPOLATED:
            dense = points(Pick(DENSE, b.recovery)).values()
            against = curve([*other.values(), *dense])
        for target, point in own.items():
            yield _against(claim, row, target, point, against)


def _reached(claim: Claim, cells: Sequence[Cell], phases: str) -> Iterator[Row]:
    """Rows of a claim on the least share at which A, and each B, is as good as dense."""
    for pick, (task, metric) in product((claim.a, *claim.b), claim.metrics):
        row: Row = {"claim": claim.name, "kind": claim.kind, "a": label(pick), "b": DENSE}
        row |= {"task": task, "metric": metric, "unit": "documents"}
        # The source's number is about A.
        row |= {} if pick == claim.a else {"published": ""}
        if saved := _saves_nothing(claim, (pick,)):
            yield row | {"verdict": "not comparable", "reason": saved}
            continue
        full = Pick(DENSE, pick.recovery)
        own, dense = (_measured(p, cells, phases, task, metric) for p in (pick, full))
        missing = [p.label for p, found in ((pick, own), (full, dense)) if not found]
        if missing:
            reason = f"no finished cell of {' and of '.join(missing)}"
            yield row | {"verdict": "not comparable", "reason": reason}
            continue
        row |= _of_task(cells, task, metric)
        (whole,) = dense.values()
        found = reach(list(own.values()), whole, row["higher_is_better"])
        row |= {"value_a": found.value, "low": found.low, "high": found.high, "n": found.n}
        row |= {"cells_a": " ".join(key for point in own.values() for key in point.cells)}
        row |= {"seeds_a": min(point.seeds for point in own.values())}
        shown = found.high < 1 - SAME
        reason = "at the least budget measured" if found.open and shown else ""
        yield row | {"verdict": "reached" if shown else "not shown", "reason": reason}


def _identical(claim: Claim, cells: Sequence[Cell], phases: str, folder: Path) -> Iterator[Row]:
    """Rows of a claim on texts, of A and each B, that are what dense writes."""
    for pick, (task, metric) in product((claim.a, *claim.b), claim.metrics):
        row: Row = {"claim": claim.name, "kind": claim.kind, "a": label(pick), "b": DENSE}
        row |= {"task": task, "metric": metric, "unit": "documents", "higher_is_better": True}
        found = _points(claim, pick, cells, phases, task, metric, folder, claim.kind)
        if not found:
            reason = f"no acceptance recorded of {pick.label}"
            yield row | {"verdict": "not comparable", "reason": reason}
        for target, point in found.items():
            about: Row = {"target_speedup": target, "fraction_a": point.fraction}
            about |= {"value_a": point.value, "value_b": 1.0, "n": len(point.documents)}
            about |= {"seeds_a": point.seeds, "cells_a": " ".join(point.cells)}
            same = point.value == 1.0
            yield row | about | {"verdict": "identical" if same else "differs", "reason": ""}


def _against(
    claim: Claim, row: Row, target: float, point: Point, against: list[Point]
) -> tuple[Row, Difference | str]:
    row = row | {"target_speedup": target, "fraction_a": point.fraction, "seeds_a": point.seeds}
    row |= {"value_a": point.value, "cells_a": " ".join(point.cells)}
    if claim.kind in INTERPOLATED:
        matched = interpolate(against, point.fraction, SLACK)
        ends = f"{against[0].fraction:.3f} to {against[-1].fraction:.3f}"
        what = COUNTED.get(claim.kind, "block FLOPs")
        missed = f"{row['b']} was measured from {ends} of dense's {what} alone"
    else:
        matched = against[0] if len(against) == 1 else None
        missed = f"{row['b']} has {len(against)} budgets; full depth is one"
    if matched is None:
        return row, missed
    row |= {"fraction_b": matched.fraction, "seeds_b": matched.seeds}
    row |= {"cells_b": " ".join(matched.cells)}
    return row, difference(point, matched)


def _routed(
    claim: Claim, cells: Sequence[Cell], phases: str, folder: Path
) -> Iterator[tuple[Row, Any]]:
    groups = _by_target(chosen(claim.a, cells, phases))
    if not groups:
        yield {"metric": "executed"}, f"no finished cell of {claim.a.label}"
    compare = recordings.sublayers if claim.kind == "sublayers" else recordings.positions
    yield from compare(claim.a.label, groups, folder)


def _judged(claim: Claim, compared: Sequence[tuple[Row, Difference | str]]) -> Iterator[Row]:
    """The rows with their numbers, the adjusted p, and the verdict."""
    enough = [found for _, found in compared if isinstance(found, Difference) and found.n >= LEAST]
    adjusted = iter(holm([found.p for found in enough]))
    for row, found in compared:
        row = {"claim": claim.name, "kind": claim.kind, "a": label(claim.a), **row}
        if isinstance(found, str):
            yield row | {"verdict": "not comparable", "reason": found}
            continue
        row |= {"value_a": found.value_a, "value_b": found.value_b, "difference": found.value}
        row["n"] = found.n
        if found.n < LEAST:
            few = f"{found.n} {row['unit']} are too few for an interval: at least {LEAST}"
            yield row | {"verdict": "not comparable", "reason": few}
            continue
        p_holm = next(adjusted)
        row |= {"low": found.low, "high": found.high, "p": found.p, "p_holm": p_holm}
        yield row | {"verdict": _verdict(row, direction(found, p_holm)), "reason": _note(row)}


def _verdict(row: Row, sign: int) -> str:
    if sign == 0:
        return "no difference shown"
    if row["kind"] == "position":
        return "rises with position" if sign > 0 else "falls with position"
    if row["kind"] == "sublayers":
        return f"{SUBLAYERS[0] if sign < 0 else SUBLAYERS[1]} executes less"
    return "better" if (sign > 0) == row["higher_is_better"] else "worse"


def _note(row: Row) -> str:
    notes = []
    if row["low"] > 0 or row["high"] < 0:
        notes += ["the interval excludes 0, but not after Holm"] if row["p_holm"] > 0.05 else []
    apart = row.get("fraction_a", 0.0) - row.get("fraction_b", 0.0)
    if row["kind"] in INTERPOLATED and abs(apart) > 1e-6:
        notes.append(f"B as measured, {abs(apart):.4f} {'below' if apart > 0 else 'above'} A")
    return "; ".join(notes)


def _points(
    claim: Claim,
    pick: Pick,
    cells: Sequence[Cell],
    phases: str,
    task: str,
    metric: str,
    folder: Path,
    kind: str,
) -> dict[float, Point]:
    """The points of one method by target, on the scale on which the claim compares; ``kind`` is
    the claim's, but where two kinds of recordings are compared."""
    if kind in ("acceptance", "transfer", "identical"):
        groups = _by_target(chosen(pick, cells, phases))
        each = {
            target: acceptance.point(
                group, folder, task, metric, "transfer" if kind == "transfer" else "acceptance"
            )
            for target, group in groups.items()
        }
        return {target: point for target, point in each.items() if point is not None}
    if claim.kind == "similarity":
        groups = _by_target(chosen(pick, cells, phases))
        found = {target: similarity.point(group, folder) for target, group in groups.items()}
        return {target: point for target, point in found.items() if point is not None}
    flops = "total" if claim.kind == "equal_total_flops" else "block"
    points = _measured(pick, cells, phases, task, metric, flops)
    if claim.kind != "equal_modules":
        return points
    groups = _by_target(chosen(pick, cells, phases))
    return {t: of_modules(point, _modules(groups[t])) for t, point in points.items()}


def _measured(
    pick: Pick, cells: Sequence[Cell], phases: str, task: str, metric: str, flops: str = "block"
) -> dict[float, Point]:
    groups = _by_target(chosen(pick, cells, phases))
    return {target: measured(group, task, metric, flops) for target, group in groups.items()}


def _modules(cells: Sequence[Cell]) -> float:
    """Share of sublayers that tokens executed, over all tasks, mean over seeds."""
    shares = [row["executed"] for cell in cells for row in cell.routing if row["phase"] == "all"]
    return sum(shares) / len(shares)


def _by_target(cells: Sequence[Cell]) -> dict[float, list[Cell]]:
    """Finished cells by target speedup; within each they differ in their seed."""
    found: dict[float, list[Cell]] = {}
    for cell in cells:
        if cell.evaluated:
            found.setdefault(cell.identity["target_speedup"], []).append(cell)
    return found


def _of_task(cells: Sequence[Cell], task: str, metric: str) -> Row:
    rows = (row for cell in cells for row in cell.accuracy)
    row = next(row for row in rows if (row["task"], row["metric"]) == (task, metric))
    return {key: row[key] for key in ("higher_is_better", "task_version")}


def _same(cell: Cell, key: str, value: Any) -> bool:
    return bool(plain(cell.identity[key]) == plain(value))


def _one_version(
    cells: list[Cell], version: Callable[[Cell], str], current: Row, complaint: str
) -> list[Cell]:
    """``cells`` if all are of one version, else those of the ``current`` one."""
    if len({version(cell) for cell in cells}) <= 1:
        return cells
    found = [cell for cell in cells if all(_same(cell, key, current[key]) for key in current)]
    if len({version(cell) for cell in found}) != 1:
        raise UserError(f"{complaint}; choose another --output_path")
    return found
