"""How much of what a method drafts is accepted, for the cells of a study: its prompts are those of
each task's documents, continued greedily.

One file a cell under the run's ``acceptance/``, and under ``transfer/`` one of the method as fitted
on texts of each task, of documents that are not continued.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.cells.cell import Cell
from dyndepth.cells.identity import Row
from dyndepth.common.files import write_atomically
from dyndepth.studies.recordings import again

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod
    from dyndepth.results.statistics.curves import Point
    from dyndepth.sweep.settings import Settings

METRIC, IDENTICAL = "acceptance", "identical"
WRITTEN = 16
"""Tokens that are written after each prompt; an end of text ends it."""
PROMPT = 128
"""Most tokens of a prompt: the last ones. Of a text that has no prompt, half as many of the first
are its prompt."""
TEXTS = 400
"""Documents of a task, none of them continued, whose texts a method is fitted on for a transfer."""

COLUMNS = (
    *("cell", "method", "parameters", "target_speedup", "seed", "task", "documents", "drafted"),
    *("accepted", "refused", "verifications", "written", "draft_share", "accepted_share", "chance"),
    *("tokens_per_verify", "identical", "reran"),
)
"""Columns of acceptance.csv: one row a cell and task, and one over ``all`` tasks. Of ``documents``
that were continued, tokens ``drafted``, ``accepted`` and ``written``, ``verifications`` and those
of them that ``refused`` a token. ``draft_share``: of full depth's block FLOPs that the drafts
executed. ``accepted_share``: of drafted tokens, those of all documents together, where a claim
takes the mean of the documents' shares; ``chance``: of those that were judged, again together.
``tokens_per_verify``: written for each verification; the first token of a text comes with its
prompt and is not among them. ``identical``: the share of texts that are what dense writes.
``reran``: passes over all blocks that those come to which the method ran again, one by one."""

Prompts = dict[str, dict[str, list[int]]]
"""Task -> document -> token ids."""


def of(tasks: Iterable[str], metric: str = METRIC) -> tuple[tuple[str, str], ...]:
    """The ``metrics`` of a claim on what is drafted after prompts of ``tasks``."""
    return tuple((task, metric) for task in tasks)


def file_of(cell: Cell, folder: Path, kind: str = METRIC) -> Path:
    """Where what was found of a run's cell lies; ``kind``: ``acceptance`` or ``transfer``. Texts of
    another length have another file: they are not to be paired."""
    return folder / kind / f"{cell.key}-{PROMPT}-{WRITTEN}.json"


def record(cells: Sequence[Cell], settings: Settings, folder: Path) -> None:
    """Measure the cells that have no file yet, on the documents that the settings score. A cell
    that cannot be rebuilt is told and left out."""
    _record(cells, settings, folder, METRIC)


def record_transfer(cells: Sequence[Cell], settings: Settings, folder: Path) -> None:
    """The same of each cell's method as fitted on texts of the task that it is measured on."""
    _record(cells, settings, folder, "transfer")


def _record(cells: Sequence[Cell], settings: Settings, folder: Path, kind: str) -> None:
    from dyndepth.routes import recorded

    missing = [cell for cell in cells if not file_of(cell, folder, kind).is_file()]
    if not missing:
        return
    bench = recorded.Loaded({})
    dense: dict[str, dict[str, list[int]]] = {}

    def measure(cell: Cell, job: Any) -> None:
        with job.ready(bench) as method:
            asked = prompts(settings, bench.tokenizer)
            written = lambda task: dense.setdefault(task, {})  # noqa: E731
            if kind == METRIC:
                found = {
                    task: drafted(bench.model, method, texts, written(task))
                    for task, texts in asked.items()
                }
            else:
                found = dict(_transferred(bench, job, settings, asked, written))
        write_atomically(file_of(cell, folder, kind), json.dumps(found))

    again(missing, settings, kind, measure)


def _transferred(
    bench: Any, job: Any, settings: Settings, asked: Prompts, written: Any
) -> Iterable[tuple[str, dict[str, dict[str, float]]]]:
    from dyndepth.data.corpus import Corpus
    from dyndepth.fitting.fits import fit_cached
    from dyndepth.routes.recorded import rebuilt

    for task, texts in asked.items():
        corpus = Corpus(_other_texts(task, settings, set(texts)), bench.tokenizer)
        method = fit_cached(rebuilt(job.identity), bench.model, corpus)
        yield task, drafted(bench.model, method, texts, written(task))


def prompts(settings: Settings, tokenizer: Any) -> Prompts:
    """What is continued: of each task the documents that ``settings`` score."""
    from dyndepth.evaluation.evaluate import sample
    from dyndepth.sweep.grid import limits
    from dyndepth.tasks import resolve

    found: Prompts = {}
    names = resolve(settings.tasks, settings.include_path)
    for name, limit in limits(settings, names).items():
        task = _load(name, settings)
        count = len(task.eval_docs)
        chosen: Sequence[int] = range(count)
        if limit is not None and limit < count:
            chosen = sample(name, count, limit, settings.sample_seed)
        found[name] = {
            f"{name}/{index}": _prompt(task, task.eval_docs[index], tokenizer) for index in chosen
        }
    return found


def _load(name: str, settings: Settings) -> Any:
    from dyndepth.evaluation.evaluate import quiet_lm_eval
    from dyndepth.tasks import task_manager

    with quiet_lm_eval():
        return task_manager([name], settings.include_path).load([name])["tasks"][name]


def _prompt(task: Any, document: Any, tokenizer: Any) -> list[int]:
    text = task.doc_to_text(document)
    if text:
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return ids[-PROMPT:]
    ids = tokenizer(str(task.doc_to_target(document)), verbose=False)["input_ids"]
    return ids[: PROMPT // 2]


def _other_texts(name: str, settings: Settings, continued: set[str]) -> list[str]:
    """Prompt and right answer of documents that are not continued; the prompt alone where several
    answers are right."""
    task = _load(name, settings)
    texts: list[str] = []
    for index, document in enumerate(task.eval_docs):
        if f"{name}/{index}" in continued:
            continue
        both = (task.doc_to_text(document), _answer(task, document))
        texts.append(" ".join(part.strip() for part in both).strip())
        if len(texts) == TEXTS:
            break
    return texts


def _answer(task: Any, document: Any) -> str:
    target = task.doc_to_target(document)
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        target = task.doc_to_choice(document)[target]  # the place of the right option
    return "" if isinstance(target, list) else str(target)


def drafted(
    model: Any,
    method: DynamicDepthMethod,
    texts: Mapping[str, Sequence[int]],
    dense: dict[str, list[int]],
) -> dict[str, dict[str, float]]:
    """By document: tokens ``drafted``, ``accepted`` and ``written``, ``verifications``, and those
    of them that ``refused`` a token; the passes over all blocks, ``reran``, that those come to
    which the method ran again; block FLOPs of the drafts, ``flops``, and what they had been at full
    depth, ``dense_flops``; and whether the text is what the dense model writes, ``identical``. What
    that writes is taken from ``dense`` by document and put there."""
    from dyndepth.models.blocks import Decoder
    from dyndepth.runtime.attach import attach
    from dyndepth.runtime.speculation import speculate

    ends, layers = _ends(model), len(Decoder.of(model).blocks)
    found = {}
    for name, ids in texts.items():
        if name not in dense:
            dense[name] = _written_densely(model, ids, ends)
        written: list[int] = []
        with attach(model, method, documents=[name], warn=False) as trace:
            for tokens in speculate(
                *(model, trace, method, ids),
                limit=WRITTEN,
                ends=lambda so_far: so_far[-1] in ends,
            ):
                written += tokens
            came, (flops, dense_flops) = trace.speculation, trace.drafts()
        found[name] = {
            "drafted": came.drafted,
            "accepted": came.accepted,
            "refused": sum(each.accepted < len(each.drafted) for each in came.rounds),
            "verifications": len(came.rounds),
            "written": len(written),
            "reran": sum(each.reran for each in came.rounds) / layers,
            "flops": flops,
            "dense_flops": dense_flops,
            "identical": float(written == dense[name]),
        }
    return found


def _ends(model: Any) -> set[int]:
    """The tokens that end a text, as the model's configuration has them."""
    given = getattr(model.generation_config, "eos_token_id", None)
    return set(given if isinstance(given, list) else [] if given is None else [given])


def _written_densely(model: Any, ids: Sequence[int], ends: set[int]) -> list[int]:
    import torch

    from dyndepth.models.caches import cache_argument, cache_of

    device = next(model.parameters()).device
    written: list[int] = []
    fed = torch.tensor([list(ids)], device=device)
    past: dict[str, Any] = {}
    with torch.no_grad():
        while len(written) < WRITTEN and not (written and written[-1] in ends):
            out = model(fed, use_cache=True, **past)
            past = {cache_argument(model): cache_of(out)}
            written.append(int(out.logits[0, -1].argmax()))
            fed = torch.tensor([written[-1:]], device=device)
    return written


def point(
    cells: Sequence[Cell], folder: Path, task: str, metric: str = METRIC, kind: str = METRIC
) -> Point | None:
    """``metric`` of one method at one target after prompts of ``task``, ``cells`` differing in
    their seed alone: by document, each weighing the same whatever was drafted in it, so that
    methods are paired. It stands at the drafts' share of block FLOPs. None where a cell has no
    file, or drafted nothing."""
    from dyndepth.results.statistics.curves import averaged, by_document

    files = [file_of(cell, folder, kind) for cell in cells]
    if not all(file.is_file() for file in files):
        return None
    points = []
    for cell, file in zip(cells, files, strict=True):
        rows = sorted(json.loads(file.read_text(encoding="utf-8")).get(task, {}).items())
        # One token is written alone: there was nothing to draft, whatever the method.
        rows = [(name, row) for name, row in rows if row["written"] > 1]
        if not rows or not sum(row["drafted"] for _, row in rows):
            return None
        of_drafts = metric == METRIC
        points.append(
            by_document(
                [name for name, _ in rows],
                [_rate(row) if of_drafts else row[metric] for _, row in rows],
                [1.0] * len(rows),
                [row["flops"] for _, row in rows],
                [row["dense_flops"] for _, row in rows],
                cells=(cell.key,),
            )
        )
    return averaged(points)


def whole(like: Point) -> Point:
    """Where every curve of acceptance ends: the whole model accepts all of its own drafts."""
    from dataclasses import replace

    import numpy as np

    count = len(like.documents)
    return replace(like, fraction=1.0, outcomes=np.ones(count), flops=like.dense_flops, cells=())


def _rate(row: Mapping[str, float]) -> float:
    """Accepted of drafted; where the method never drafts, nothing is accepted."""
    return row["accepted"] / row["drafted"] if row["drafted"] else 0.0


def table(cells: Sequence[Cell], folder: Path) -> list[Row]:
    """Rows of acceptance.csv of those ``cells`` that have a file."""
    found: list[Row] = []
    for cell in cells:
        file = file_of(cell, folder)
        if not file.is_file():
            continue
        tasks = json.loads(file.read_text(encoding="utf-8"))
        keys = ("method", "parameters", "target_speedup", "seed")
        about = {"cell": cell.key} | {key: cell.identity[key] for key in keys}
        each = {task: list(documents.values()) for task, documents in tasks.items()}
        each["all"] = [row for rows in each.values() for row in rows]
        found += [about | {"task": task} | _summed(rows) for task, rows in each.items()]
    return found


def _summed(rows: Sequence[Mapping[str, float]]) -> Row:
    counts = ("drafted", "accepted", "refused", "verifications", "written")
    sums = (*counts, "reran", "flops", "dense_flops")
    total = {key: sum(row[key] for row in rows) for key in sums}
    judged = total["accepted"] + total["refused"]
    later = total["written"] - len(rows)

    def share(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    return {
        "documents": len(rows),
        **{key: int(total[key]) for key in counts},
        "draft_share": share(total["flops"], total["dense_flops"]),
        "accepted_share": share(total["accepted"], total["drafted"]),
        "chance": share(total["accepted"], judged),
        "tokens_per_verify": share(later, total["verifications"]),
        "identical": share(sum(row["identical"] for row in rows), len(rows)),
        "reran": total["reran"],
    }
