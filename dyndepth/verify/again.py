"""Recomputes cells on some of their documents, on a sweep's own workbench, and compares.

What is computed is what the command of ``dyndepth.sweep.rerun``
would: the same plan, fitted or taken
from the cache of fits, the same tasks, prompts and batch size. Wall-clock is not measured again.

Rounding depends on which documents share a batch, and at a gate's threshold it can decide. So what
differs is scored once more with all documents of its task, in the very batches of the sweep; what
differs then too is a failure. On other hardware, in half precision or by other code it is a note,
as long as it stays within a coarse tolerance, and an answer may be another only where the
log-likelihoods or the text behind it are.

Some things can be had with all documents only: examples drawn at random before each question follow
the order of all questions, and a bound that chooses among ``candidates`` is shown the outcomes of
all that it was shown (it then scores the drawn ones).
"""

from __future__ import annotations

import random
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dyndepth.cells.cell import Cell, CellSpec
from dyndepth.cells.identity import Row, agrees
from dyndepth.cells.recipe import NONE
from dyndepth.common.errors import UserError
from dyndepth.sweep.rerun import plan_of, settings_of
from dyndepth.sweep.settings import Settings
from dyndepth.sweep.workbench import free_memory
from dyndepth.sweep.worker import in_one_line
from dyndepth.verify.differences import COARSE, EXACT, KEYS, differences, differs
from dyndepth.verify.findings import Finding

SAME_THING = (
    "model_fingerprint",
    "tokenizer_fingerprint",
    "data_fingerprint",
    "corpus_fingerprint",
    "chat_template_fingerprint",
)
"""Without these there is nothing to compare."""
SAME_CODE = ("harness_code", "method_code", "fit_version", "torch", "transformers", "lm_eval")


@dataclass(frozen=True)
class How:
    """What the user chose: ``documents`` a task (None: all), the seed of the draw, and flags of the
    sweep that no identity holds (``corpus``, ``include_path``) or that may be others here."""

    documents: int | None = 4
    seed: int = 0
    flags: Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    debug: bool = False


def drawn(cells: Sequence[Cell], count: int | None, seed: int) -> list[Cell]:
    """``count`` of the scored cells (None: all) at random, one of each method before a second."""
    queues: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.evaluated:
            queues[cell.identity["method"]].append(cell)
    draw = random.Random(seed)
    names = sorted(queues)
    draw.shuffle(names)
    for name in names:
        draw.shuffle(queues[name])
    found = []
    for turn in range(max(map(len, queues.values()), default=0)):
        found += [queues[name][turn] for name in names if turn < len(queues[name])]
    chosen = {cell.key for cell in found[:count]}
    return [cell for cell in cells if cell.key in chosen]


def again(cells: Sequence[Cell], how: How) -> Iterator[tuple[Cell, list[Finding]]]:
    """Recompute ``cells`` and yield each, as it is done, with what was found; a model is loaded
    once for all that share it.

    Raises:
        UserError: a model, corpus or task that cannot be had.
    """
    from dyndepth.models.loading import layer_count
    from dyndepth.sweep.grid import limits
    from dyndepth.sweep.workbench import Workbench
    from dyndepth.tasks import resolve

    groups: dict[str, list[tuple[Cell, Settings]]] = defaultdict(list)
    flags = dict(how.flags or {})
    for cell in cells:
        try:
            wanted = settings_of(cell.identity, **flags)
            wanted = replace(wanted, trust_remote_code=how.trust_remote_code)
        except UserError as fault:
            yield cell, [Finding(cell.key, "cannot be computed again", found=str(fault))]
            continue
        groups[repr(_shared(wanted))].append((cell, wanted))
    for members in groups.values():
        shared = _shared(members[0][1])
        layers = layer_count(shared.model, shared.revision, shared.trust_remote_code)
        tasks = resolve(shared.tasks, shared.include_path)
        bench = Workbench(shared, limits(shared, tasks))
        for cell, wanted in members:
            try:
                found = _of_cell(cell, plan_of(cell.identity, wanted, layers), bench, how)
            except Exception as fault:  # noqa: BLE001 - whatever a method does, others are verified
                if how.debug:
                    traceback.print_exc()
                found = [Finding(cell.key, "cannot be computed again", found=in_one_line(fault))]
                free_memory()
            yield cell, found


def _shared(wanted: Settings) -> Settings:
    """Settings without what tells one cell of a sweep from another."""
    one: dict[str, Any] = {"methods": "", "speedups": (1.0,), "seed": (0,), "recovery": (NONE,)}
    return replace(wanted, phases="both", **one)


def _of_cell(cell: Cell, plan: CellSpec, bench: Any, how: How) -> list[Finding]:
    mine = bench.identity(plan)
    apart = [key for key in SAME_THING if not agrees(key, cell.identity[key], mine[key])]
    if apart:
        return [Finding(cell.key, key, str(cell.identity[key]), str(mine[key])) for key in apart]
    why = excuse(cell, mine, bench.provenance(plan))
    if how.documents is None or bench.num_fewshot != 0:
        tables = bench.evaluate(plan)
        made = {name: getattr(tables, name) for name in KEYS}
        exact = [each for name in KEYS for each in differences(cell, name, made[name], EXACT)]
        # Where answers may flip, the other tables follow the documents.
        return _excused(cell, exact, made["samples"], why)
    documents = _chosen(cell, how)
    rows = rescored(bench, plan, documents)
    found = _excused(cell, differences(cell, "samples", rows, EXACT), rows, why)
    if not any(each.failure for each in found):
        return found
    tolerance = COARSE if why else EXACT
    tasks = {row["task"] for row in rows if differs(cell, row, tolerance)}
    every = {task: [row["doc_id"] for row in cell.samples if row["task"] == task] for task in tasks}
    anew = [r for r in rescored(bench, plan, every) if r["doc_id"] in documents[r["task"]]]
    kept = [row for row in rows if row["task"] not in tasks]
    return _excused(cell, differences(cell, "samples", kept + anew, EXACT), kept + anew, why)


def _excused(cell: Cell, found: list[Finding], samples: Sequence[Row], why: str) -> list[Finding]:
    """``found`` by exact comparison; or one note instead, where there is an excuse for it and it
    stays within the coarse tolerance."""
    if not (found and why):
        return found
    beyond = differences(cell, "samples", samples, COARSE)
    what = f"is not exactly what is stored ({why}); allowed: {COARSE}"
    return beyond or [replace(found[0], what=f"{found[0].what} {what}", failure=False)]


def excuse(cell: Cell, mine: Row, conditions: Row) -> str:
    """Why what is computed here may be another than what is stored; empty if it may not. ``mine``
    is the identity that the cell would have here, ``conditions`` its provenance."""
    own, stored = cell.identity, cell.provenance
    if (own["dtype"], own["device"], mine["device"]) != ("float32", "cpu", "cpu"):
        return "not float32 on the CPU"
    apart = [key for key in SAME_CODE if own[key] != mine[key]]
    if apart:
        return f"other {', '.join(apart)} here"
    same_machine = all(stored.get(key) == conditions[key] for key in ("device_name", "threads"))
    learned = (
        conditions["needs_training"]
        or conditions["uses_labels"]
        or conditions["granularity"] == "token"
        or own["recovery"] != NONE
    )
    return (
        "fitted or decided by the token, on another machine" if learned and not same_machine else ""
    )


def _chosen(cell: Cell, how: How) -> dict[str, list[int]]:
    """Documents of each task, drawn for this cell."""
    ids: dict[str, list[int]] = defaultdict(list)
    for row in cell.samples:
        ids[row["task"]].append(row["doc_id"])
    return {
        task: sorted(
            random.Random(f"{how.seed}/{cell.key}/{task}").sample(
                sorted(every), min(how.documents or len(every), len(every))
            )
        )
        for task, every in ids.items()
    }


def rescored(bench: Any, plan: CellSpec, documents: Mapping[str, Sequence[int]]) -> list[Row]:
    """Rows of samples.parquet of some ``documents`` (indices by task), scored on the ``bench``.

    A method with ``candidates`` first chooses by all documents of these tasks, as in the sweep.
    """
    from lm_eval.evaluator import evaluate as run_lm_eval

    from dyndepth.evaluation import evaluate, rows
    from dyndepth.evaluation.language_model import DyndepthLM

    wanted = bench.settings
    how: dict[str, Any] = {
        "num_fewshot": bench.num_fewshot,
        "include_path": wanted.include_path,
    }
    with bench.fitted(plan) as method, evaluate.quiet_lm_eval():
        for task in documents:
            evaluate.let_choose(
                bench.model,
                bench.tokenizer,
                method,
                task,
                limit=bench.limits[task],
                seed=wanted.sample_seed,
                batch_size=wanted.batch_size,
                progress=False,
                **bench.chat.settings(),
                **how,
            )
        loaded, _ = evaluate.drawn_tasks(list(documents), None, wanted.sample_seed, **how)
        reader = DyndepthLM(bench.model, method, bench.tokenizer, wanted.batch_size, progress=False)
        chosen = {task: list(indices) for task, indices in documents.items()}
        reader.document_index = chosen
        reader.converse(bench.chat)
        results = run_lm_eval(
            reader,
            {"tasks": loaded},
            samples=chosen,
            bootstrap_iters=0,
            log_samples=True,
            **bench.chat.settings(),
        )
        assert results is not None
        return [
            row
            for name, task in loaded.items()
            for row in rows.sample_rows(name, task, results["samples"][name], reader.costs[name])
        ]
