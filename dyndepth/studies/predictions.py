"""What speculation should come to on models of public shapes, at the acceptances that a study
measured: predictions by the bytes of weights (``dyndepth.runtime.draft_costs``), no measurements.

A shape's draft runs the share of each block's bytes that the measured one ran of block FLOPs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dyndepth.cells.cell import Cell
from dyndepth.cells.identity import Row
from dyndepth.studies.acceptance import file_of

COLUMNS = (
    *("shape", "source", "parameters", "head_share", "method", "parameters_of_method"),
    *("target_speedup", "seed", "cell", "draft_share", "accepted_share", "chance", "length"),
    *("draft_cost", "predicted_speedup", "best_length", "best_predicted_speedup", "break_even"),
)
"""Columns of predictions.csv: one row a shape and cell. ``draft_share``: of full depth's block
FLOPs, in the cell's drafts; ``accepted_share``: of all drafted tokens; ``chance``: of those that
were judged (``draft_costs.chance``); ``length``: mean tokens of a draft. ``draft_cost`` is that of
a drafted token in steps of the whole model, by bytes; ``break_even`` the chance from which the best
length is no slower than steps."""


def predictions(cells: Sequence[Cell], folder: Path) -> Iterator[Row]:
    """Rows for every known shape, and each of ``cells`` whose acceptance was recorded."""
    from dyndepth.runtime.draft_costs import DraftCosts, best_length, break_even, predicted_speedup

    measured = [found for cell in cells if (found := _measured(cell, folder)) is not None]
    if not measured:
        return
    for shape in _shapes():
        of_blocks = shape.pop("blocks_share")
        for each in measured:
            costs = DraftCosts(each["draft_share"] * of_blocks + (1 - of_blocks))
            length = max(1, round(each["length"]))
            best = best_length(each["chance"], costs)
            yield (
                shape
                | each
                | {
                    "draft_cost": costs.draft,
                    "predicted_speedup": predicted_speedup(each["chance"], length, costs),
                    "best_length": best,
                    "best_predicted_speedup": predicted_speedup(each["chance"], best, costs),
                    "break_even": break_even(costs),
                }
            )


def _measured(cell: Cell, folder: Path) -> Row | None:
    """What a cell's drafts came to over all tasks; None where nothing was recorded or drafted."""
    file = file_of(cell, folder)
    if not file.is_file():
        return None
    tasks = json.loads(file.read_text(encoding="utf-8")).values()
    rows = [row for documents in tasks for row in documents.values()]
    total = {key: sum(row[key] for row in rows) for key in rows[0]}
    judged = total["accepted"] + total["refused"]
    if not total["drafted"] or not judged:
        return None
    return {
        "method": cell.identity["method"],
        "parameters_of_method": cell.identity["parameters"],
        "target_speedup": cell.identity["target_speedup"],
        "seed": cell.identity["seed"],
        "cell": cell.key,
        "draft_share": total["flops"] / total["dense_flops"],
        "accepted_share": total["accepted"] / total["drafted"],
        "chance": total["accepted"] / judged,
        "length": total["drafted"] / total["verifications"],
    }


def _shapes() -> Iterator[dict[str, Any]]:
    """The public shapes by size: nothing of them takes memory."""
    import torch
    from transformers import AutoModelForCausalLM

    from dyndepth.models.shapes import SHAPE, shape_config, shapes
    from dyndepth.runtime.draft_costs import step_bytes

    found = []
    for name, one in shapes().items():
        if one.get("use") == "trial":
            continue
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape_config(SHAPE + name))
        weights = step_bytes(model)
        found.append(
            {
                "shape": name,
                "source": one["source"],
                "parameters": sum(each.numel() for each in model.parameters()),
                "head_share": weights.head_share,
                "blocks_share": float(weights.blocks.sum()) / weights.step,
            }
        )
    yield from sorted(found, key=lambda each: each["parameters"])
