"""Cells and a bench made by hand, for tests of what the harness does with results."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from dyndepth.cells.cell import Cell, CellSpec
from dyndepth.cells.identity import CHAT, IDENTITY, Row
from dyndepth.cells.times import Shape


def identity(**changes: Any) -> Row:
    """A complete identity; ``changes`` replace some of its values."""
    base = dict.fromkeys(IDENTITY, "x") | dict.fromkeys(CHAT, "")
    base |= {
        "model": "tiny",
        "method": "dense",
        "parameters": "",
        "target_speedup": 1.0,
        "seed": 0,
        "recovery": "none",
        "tasks": ["one", "two"],
        "limit": {"two": None, "one": 4},
    }
    assert set(changes) <= set(IDENTITY)
    return base | changes


def rows(right: list[int], task: str = "one") -> dict[str, list[Row]]:
    """Accuracy, compute, routing and sample rows of one task; ``right`` is 1 or 0 by document."""
    accuracy = {"task": task, "metric": "acc", "filter": "none", "value": sum(right) / len(right)}
    accuracy |= {"stderr": 0.1, "n": len(right), "higher_is_better": True, "task_version": 1.0}
    compute = {"task": task, "phase": "all", "tokens": 100, "block_flops_per_token": 1e6 / 3}
    compute |= {"total_flops_per_token": 5e5, "block_speedup": 1.5, "total_speedup": 1.2}
    routing = {"task": "all", "phase": "all", "layer": 0, "sublayer": "mlp", "executed": 0.5}
    samples = [
        {"task": task, "doc_id": index, "doc_hash": f"h{index}", "metric": "acc,none"}
        | {"outcome": hit, "outcomes": f'{{"acc,none": {hit}}}'}
        for index, hit in enumerate(right)
    ]
    return {
        "accuracy": [accuracy],
        "compute": [compute],
        "routing": [routing],
        "samples": samples,
    }


def cell(right: list[int] = [1, 0, 1, 1], **changes: Any) -> Cell:  # noqa: B006
    """A finished cell."""
    return Cell(identity(**changes), **rows(right))


class FakeBench:
    """Computes cells from a plan alone; ``calls`` says what it was asked for.

    ``broken`` holds methods whose evaluation fails, ``interrupt_at`` the number of the evaluation
    in which Ctrl-C arrives.
    """

    def __init__(self, broken: tuple[str, ...] = (), interrupt_at: int | None = None) -> None:
        self.broken, self.interrupt_at = broken, interrupt_at
        self.calls: list[tuple[str, str]] = []
        self.timing_fails = False
        self.modes: list[str] = []
        self.shapes: list[list[str]] = []
        self.no_modes: tuple[str, ...] = ()

    shared_identity: Row = {}  # noqa: RUF012

    def identity(self, plan: CellSpec) -> Row:
        return identity(
            method=plan.method,
            target_speedup=plan.target_speedup,
            seed=plan.seed,
            recovery=plan.recovery,
        )

    def provenance(self, plan: CellSpec) -> Row:
        return {"uses_labels": plan.method == "oracle", "device_name": "abacus", "threads": 1}

    def evaluate(self, plan: CellSpec) -> Any:
        self.calls.append(("evaluate", plan.describe()))
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt
        if plan.method in self.broken:
            raise ValueError("no such\nlayer")
        right = [1, 1, 1, 0] if plan.method == "dense" else [1, 0, 1, 0]
        return SimpleNamespace(**rows(right))

    def measure(
        self, plan: CellSpec, samples: list[Row], mode: str, shapes: Sequence[Shape] = ()
    ) -> list[Row]:
        self.calls.append(("measure", plan.describe()))
        self.modes.append(mode)
        self.shapes.append([str(shape) for shape in shapes])
        if self.timing_fails or mode in self.no_modes:
            raise RuntimeError("clock stopped")
        assert samples
        timed = [(shape, {"shapes": "asked"}) for shape in shapes]
        timed = timed or [(Shape(batch, 8, 2), {"shapes": "level"}) for batch in (1, 8)]
        return [
            {"phase": phase, "batch": batch, "length": length, "wall_speedup": 1.1 + batch}
            | {"new_tokens": steps * (phase == "decode")}
            | more
            for phase in ("prefill", "decode")
            for (batch, length, steps), more in timed
        ]
