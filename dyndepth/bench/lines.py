"""The lines of the part ``shapes`` of ``python -m dyndepth.bench``: their names, what is said of
one, and the file that keeps them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dyndepth.cells.identity import plain
from dyndepth.common.digests import harness_code, timing_code
from dyndepth.common.errors import UserError
from dyndepth.common.files import write_atomically
from dyndepth.common.modes import GRAPHS
from dyndepth.results.noise import told

REFERENCE = "masked_reference"
"""Compute everything and multiply by masks of 50%, as published references do: the backend
``masked`` of the runtime. All other works run on ``sparse``."""
WORKS = (
    "all_execute",
    "static_8",
    "static_15",
    "mask_75",
    "mask_50",
    "early_exit_half",
    REFERENCE,
)
EVICTED = "mask_50_evicted"
"""Masks of whole blocks whose skipped tokens are not seen by others, and keep no keys."""
MORE_WORKS = ("mask_50_attention", "mask_50_mlp", "mask_50_blocks", EVICTED)
"""On request: masks in one of the two sublayers, the other one executes; masks of whole blocks, and
the same with eviction."""
EAGER_WORKS = (REFERENCE, EVICTED)
"""That no graph repeats."""

Line = dict[str, float]
Lines = dict[str, Line]
"""By ``work/phase/dtype``, and ``/graphs`` in that mode: ``speedup`` with its interval ``low`` to
``high``, ``suspect`` if it is more than the FLOPs allow, ``flop_ideal``, ``byte_ideal``,
``efficiency``, ``peak_ratio`` (NaN where memory is not measured)."""

NOT_YET = "not measured yet"
NO_TIME = "no time was left"
NO_MEMORY = "it does not fit in the device's memory"

LIMITS = "gather_limits"
HINTS = ("load_average", "gpu", "dtype", LIMITS)
"""Conditions that may differ between the lines of one file; the limits by precision."""


def names(works: Sequence[str], phase: str, dtype: str, mode: str) -> dict[str, str]:
    """The name of each work's line."""
    graphs = mode == GRAPHS
    return {
        work: f"{work}/{phase}/{dtype}" + "/graphs" * graphs
        for work in works
        if not (graphs and work in EAGER_WORKS)
    }


def speed(line: Line) -> str:
    """A line's speedup with its noise."""
    ends = line.get("low"), line.get("high")
    return told(line["speedup"], *ends, bool(line.get("suspect")), form="{:.3f}")


class Record:
    """What was measured, in this call and in earlier ones that wrote the same file.

    Attributes:
        lines: what was measured.
        left: by its name each line that is wanted and was not measured, and why.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        """Reads the file, if ``options`` name one that is there. Raises UserError where it is of
        another kind, model, code or number of rounds."""
        self.path: Path | None = options.output_path
        self.lines: Lines = {}
        self.left: dict[str, str] = {}
        self._about: dict[str, Any] = {
            "model": options.model,
            "revision": getattr(options, "revision", None),
            "repeats": options.repeats,
            "code": f"{harness_code()} {timing_code()}",
        }
        self._kept: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            self._kept, self.lines = _read(self.path)
            self._compare(self._kept, self._about)
        self._limits: dict[str, str] = self._kept.get(LIMITS) or {}

    def want(self, wanted: Iterable[str]) -> None:
        """Names of lines to be measured."""
        self.left = dict.fromkeys([name for name in wanted if name not in self.lines], NOT_YET)

    def under(self, conditions: Mapping[str, Any]) -> None:
        """Measure under these ``dyndepth.timing.conditions``. Raises UserError if the lines that
        were kept are of others."""
        found = json.loads(json.dumps(plain(dict(conditions))))
        dtype, limits = found["dtype"], found[LIMITS]
        if self._kept:
            now = {key: value for key, value in found.items() if key not in HINTS}
            kept = self._limits.get(dtype, limits)
            self._compare(self._kept | {LIMITS: kept}, now | {LIMITS: limits})
        self._limits[dtype] = limits
        self._about |= found | {LIMITS: self._limits}

    def put(self, measured: Lines) -> None:
        """Keep lines."""
        self.lines |= measured
        for name in measured:
            self.left.pop(name, None)
        self.write()

    def leave(self, wanted: Iterable[str], why: str) -> None:
        """Say why lines are not measured."""
        self.left |= {name: why for name in wanted if name not in self.lines}
        self.write()

    def write(self) -> None:
        """Write the file, if there is to be one."""
        if self.path is not None:
            found = plain({"about": self._about, "left": self.left, "bench": self.lines})
            write_atomically(self.path, json.dumps(found, indent=1, allow_nan=False) + "\n")

    def _compare(self, kept: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        other = [f"{key} ({kept.get(key)}, now {now[key]})" for key in now
                 if kept.get(key) != now[key]]  # fmt: skip
        if other:
            raise UserError(
                f"--output_path {str(self.path)!r} has lines of another {' and '.join(other)}; "
                "name another, or remove it"
            )


def _read(path: Path) -> tuple[dict[str, Any], Lines]:
    """What a file says that it was measured under, and its lines. Raises UserError for a file of
    another kind."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return dict(found["about"]), numbers(found["bench"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"--output_path {str(path)!r} is no file of a bench; name another"
        ) from None


def numbers(lines: Mapping[str, Mapping[str, Any]]) -> Lines:
    """Lines as they are read from JSON, which has no NaN."""
    return {
        name: {key: math.nan if value is None else value for key, value in line.items()}
        for name, line in lines.items()
    }
