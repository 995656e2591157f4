"""What speculation should come to on models of public shapes, at the acceptances that a study
measured: predictions by the bytes of weights (``dyndepth.runtime.draft_costs``), no measurements.

A shape's draft runs the share of each block's bytes that the measured one ran of block FLOPs, and
what a method ran again after a verification reads those blocks once more. Left out, as not
recorded: LM heads that a draft's method runs for itself, and keys and values that it computes of
attentions that it skips.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dyndepth.cells.identity import Row

_OF_CELL = (
    *("cell", "method", "parameters", "target_speedup", "seed"),
    *("draft_share", "accepted_share", "chance"),
)
COLUMNS = (
    *("shape", "source", "size", "head_share", *_OF_CELL, "length"),
    *("draft_cost", "verify_cost", "predicted_speedup"),
    *("best_length", "best_predicted_speedup", "break_even"),
)
"""Columns of predictions.csv: one row a shape and cell. ``size``: parameters of the shape;
``head_share``: its LM head's of the bytes that a step reads. ``draft_share``: of full depth's block
FLOPs, in the cell's drafts; ``accepted_share``: of all drafted tokens; ``chance``: of those that
were judged (``draft_costs.chance``); ``length``: mean tokens of a draft. ``draft_cost`` is that of
a drafted token in steps of the whole model, by bytes, ``verify_cost`` that of a verification and of
what follows it. ``best_length``: 0 where no draft pays, which then are steps. ``break_even``: the
chance from which the best length is no slower than steps."""


def predictions(accepted: Sequence[Row]) -> Iterator[Row]:
    """Rows for every known shape, and each of the rows of acceptance.csv that are of all tasks."""
    from dyndepth.runtime.draft_costs import DraftCosts, best_length, break_even, predicted_speedup

    measured = [row for row in accepted if row["task"] == "all" and row["chance"] is not None]
    if not measured:
        return
    for shape in _shapes():
        of_blocks = shape.pop("blocks_share")
        for row in measured:
            about = {key: row[key] for key in _OF_CELL}
            again = row["reran"] / row["verifications"] * of_blocks
            costs = DraftCosts(row["draft_share"] * of_blocks + (1 - of_blocks), 1 + again)
            length = row["drafted"] / row["verifications"]
            whole = max(1, round(length))
            best = best_length(row["chance"], costs)
            fastest = predicted_speedup(row["chance"], best, costs)
            if fastest < 1:  # than by steps, after which nothing is run again
                best, fastest = 0, 1.0
            yield (
                shape
                | about
                | {
                    "length": length,
                    "draft_cost": costs.draft,
                    "verify_cost": costs.verify,
                    "predicted_speedup": predicted_speedup(row["chance"], whole, costs),
                    "best_length": best,
                    "best_predicted_speedup": fastest,
                    "break_even": break_even(costs),
                }
            )


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
                "size": sum(each.numel() for each in model.parameters()),
                "head_share": weights.head_share,
                "blocks_share": float(weights.blocks.sum()) / weights.step,
            }
        )
    yield from sorted(found, key=lambda each: each["size"])
