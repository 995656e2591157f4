"""How near a method's final hidden states stay to the dense model's, for the cells of a study.

The cosine of both at each token of evaluation passages, the first token left out: there is nothing
to predict it from. One file a cell under the run's ``similarity/``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.cells.cell import Cell
from dyndepth.cells.recipe import NONE
from dyndepth.common.files import write_atomically
from dyndepth.studies.recordings import LENGTH, PROMPT, again

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dyndepth.method import DynamicDepthMethod
    from dyndepth.results.statistics.curves import Point
    from dyndepth.sweep.settings import Settings


METRIC = "cosine"
DOCUMENTS = 16
"""Passages that each cell is measured on."""


def file_of(cell: Cell, folder: Path) -> Path:
    """Where the similarities of a run's cell lie."""
    return folder / "similarity" / f"{cell.key}.json"


def record(cells: Sequence[Cell], settings: Settings, folder: Path) -> None:
    """Measure the cells that have no file yet, on ``DOCUMENTS`` evaluation passages.

    A cell that cannot be rebuilt is told and left out.
    """
    from dyndepth.routes import recorded

    missing = [cell for cell in cells if not file_of(cell, folder).is_file()]
    if not missing:
        return
    texts = recorded.documents(None, DOCUMENTS)
    bench = recorded.Loaded({})
    whole: dict[str, Tensor] = {}  # the dense model's states, as long as its weights are the same

    def measure(cell: Cell, job: Any) -> None:
        with job.ready(bench) as method:
            tokens = tokens_of(texts, bench.tokenizer)
            kept = whole if cell.identity["recovery"] == NONE else {}
            found = cosines(bench.model, method, tokens, kept)
        write_atomically(file_of(cell, folder), json.dumps(found))

    again(missing, settings, "similarity", measure)


def tokens_of(texts: dict[str, str], tokenizer: Any) -> dict[str, list[int]]:
    """Token ids of each document, cut after ``LENGTH``; those too short to compare are left out."""
    encoded = {name: tokenizer.encode(text)[:LENGTH] for name, text in texts.items()}
    return {name: ids for name, ids in encoded.items() if len(ids) > PROMPT}


def cosines(
    model: nn.Module,
    method: DynamicDepthMethod,
    documents: dict[str, list[int]],
    dense: dict[str, Tensor] | None = None,
) -> dict[str, dict[str, float]]:
    """By document: mean ``cosine`` of the final hidden states (after the final norm) of ``method``
    and of the dense model, over the ``tokens`` after the prompt; and block FLOPs of both,
    ``flops`` and ``dense_flops``. The dense model's states are taken from ``dense``, by document
    ``[tokens, hidden]``, and put there."""
    import torch
    from torch.nn.functional import cosine_similarity

    from dyndepth.models.blocks import decoder
    from dyndepth.models.rotary import forget
    from dyndepth.runtime.attach import attach

    found = {}
    dense = {} if dense is None else dense
    for name, tokens in documents.items():
        ids = torch.tensor([tokens], device=next(model.parameters()).device)
        with torch.no_grad():
            if name not in dense:
                forget(model)
                dense[name] = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
            with attach(model, method, documents=[name], prompt_length=PROMPT, warn=False) as trace:
                thin = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
                totals = trace.totals()
        whole, thinned = (states[PROMPT:].double() for states in (dense[name], thin[0]))
        apart = cosine_similarity(whole, thinned, dim=-1)
        found[name] = {
            METRIC: float(apart.mean()),
            "tokens": len(apart),
            "flops": totals["block_flops"],
            "dense_flops": totals["dense_block_flops"],
        }
    return found


def point(cells: Sequence[Cell], folder: Path) -> Point | None:
    """The mean cosine of one method at one target, ``cells`` differing in their seed alone; None
    where a cell has no file."""
    from dyndepth.results.statistics.curves import averaged, by_document

    files = [file_of(cell, folder) for cell in cells]
    if not all(file.is_file() for file in files):
        return None
    points = []
    for cell, file in zip(cells, files, strict=True):
        rows = sorted(json.loads(file.read_text(encoding="utf-8")).items())
        points.append(
            by_document(
                [name for name, _ in rows],
                [row[METRIC] for _, row in rows],
                [row["tokens"] for _, row in rows],
                [row["flops"] for _, row in rows],
                [row["dense_flops"] for _, row in rows],
                cells=(cell.key,),
            )
        )
    return averaged(points)
