"""What a sweep will cost, before it runs: FLOPs from the architecture, seconds from a rate.

The FLOPs of a token are exact (read off the model's shapes, on no device); the tokens of a document
are assumed, and the rate is that of a matrix product measured here, times an assumed utilisation.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from dyndepth.cells.cell import CellSpec
from dyndepth.cells.recipe import NONE
from dyndepth.common.commands import print_table
from dyndepth.sweep.grid import Grid
from dyndepth.sweep.settings import Settings

TOKENS = 100
"""Assumed tokens of a document with all its choices."""
DOCUMENTS = 2000
"""Assumed documents of a task that is scored whole."""
UTILISATION = 0.5
"""Assumed share of the matrix product's rate that a model reaches."""
TIMING_SECONDS = {"off": 0.0, "quick": 9.0, "full": 300.0}
"""Assumed seconds that the timing of a cell takes on a small model."""


def skeleton(settings: Settings) -> Any:
    """The model's modules without their weights, on torch's meta device.

    Raises:
        UserError: a missing model or an unsupported architecture.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from dyndepth.models.loading import checked_config

    config = checked_config(settings.model, settings.revision, settings.trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=settings.trust_remote_code
        )


def cell_flops(plan: CellSpec, documents: Iterable[int | None], model: Any) -> float:
    """FLOPs of scoring one cell: blocks at the target speedup, LM head on every token."""
    from dyndepth.runtime.flops import BlockCosts

    costs = BlockCosts.of(model)
    tokens = sum(number or DOCUMENTS for number in documents) * TOKENS
    return tokens * (costs.block(TOKENS / 2) / plan.target_speedup + costs.lm_head)


def measured_rate(device: str, dtype: str, seconds: float = 0.3) -> float:
    """FLOPs per second of a large matrix product here."""
    import torch

    from dyndepth.timing.pairing import draining

    size, drain = 768 if device == "cpu" else 4096, draining(device)
    matrix = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))

    def product() -> None:
        torch.mm(matrix, matrix)
        drain()

    product()
    started, runs = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        product()
        runs += 1
    return 2 * size**3 * runs / (time.perf_counter() - started)


def print_estimate(settings: Settings, found: Grid) -> None:
    """Print the cells with FLOPs and rough seconds each, and what was assumed."""
    from rich.markup import escape
    from rich.table import Table

    from dyndepth.method import DynamicDepthMethod
    from dyndepth.models.loading import resolve_device

    model = skeleton(settings)
    device = resolve_device(settings.device)
    rate = measured_rate(device, settings.dtype)
    table = Table(title="Cells of this sweep (dry run: nothing was written)")
    for heading in ("#", "cell", "trains", "GFLOPs", "seconds"):
        table.add_column(heading, justify="left" if heading == "cell" else "right")
    documents = found.documents.values()
    whole = None in documents
    total, tried = 0.0, False
    for index, plan in enumerate(found.cells, start=1):
        flops = cell_flops(plan, documents, model)
        seconds = flops / (UTILISATION * rate) + TIMING_SECONDS[settings.timing]
        total += seconds
        method = plan.build()
        trains = "yes" if method.needs_training or plan.recovery != NONE else ""
        tried |= type(method).candidates is not DynamicDepthMethod.candidates
        table.add_row(
            str(index), escape(plan.describe()), trains, f"{flops / 1e9:,.0f}", f"{seconds:,.0f}"
        )
    print_table(table)
    trying = "; trying a bound's routes comes on top" if tried else ""
    print(
        f"about {total / 60:.1f} minutes in all; assumed: {TOKENS} tokens a document"
        f"{f', {DOCUMENTS} documents of a whole task' if whole else ''}, "
        f"{UTILISATION:.0%} of the measured {rate / 1e9:,.0f} GFLOP/s of a matrix product on "
        f"{device}, {TIMING_SECONDS[settings.timing]:.0f} s of timing a cell; "
        f"training, where a method needs it and has no cached fit, comes on top{trying}"
    )
