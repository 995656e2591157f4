"""The record of a cell: what was run, what came out, or why it failed.

A cell is (model, method, its parameters, target speedup, seed, recovery) under the run's settings.
Its identity holds everything that changes the numbers; the identity's hash names the cell, so that
a finished one is found again and never computed twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from dyndepth.recipe import NONE, shortened

IDENTITY = (
    "model",
    "model_fingerprint",
    "tokenizer_fingerprint",
    "revision",
    "method",
    "parameters",
    "phases",
    "target_speedup",
    "seed",
    "recovery",
    "fit_version",
    "dtype",
    "device",
    "attn_implementation",
    "tasks",
    "limit",
    "sample_seed",
    "num_fewshot",
    "batch_size",
    "data_fingerprint",
    "corpus_fingerprint",
    "torch",
    "transformers",
    "lm_eval",
    "dyndepth",
    "harness_code",
    "method_code",
    "git_commit",
)
"""Keys of an identity, in the order in which they lead every table's columns."""

LEADING = ("cell", *IDENTITY, "bound", "remote_code")
"""The columns that lead every table: the cell's hash, its identity, ``bound``, True where the
method sees labels: a bound, no competitor, and ``remote_code``, True where code that came with the
model had been loaded, None where nobody looked."""

UNHASHED = frozenset({"model", "git_commit"})
"""Part of every row, but not of the hash: where the weights lie is no matter of their values
(``model_fingerprint`` is), and a commit that touches no hashed code changes no number."""

ADDED = {"tokenizer_fingerprint": ""}
"""Keys that cells recorded before do not have, and as what they are read there. As long as a key
says no more than that, it is no part of a hash."""

VERSIONS = ("torch", "transformers", "lm_eval", "dyndepth")
"""Packages whose version is a part of the identity, by the name they are installed by."""

METHOD_KEYS = frozenset(
    {
        "method",
        "parameters",
        "phases",
        "target_speedup",
        "seed",
        "recovery",
        "fit_version",
        "corpus_fingerprint",
        "method_code",
    }
)
"""Keys that tell one method's cell from another's in the same setting."""

ROWS = ("accuracy", "compute", "routing", "timing", "samples")
TIMING_LEVELS = ("off", "quick", "full")

Row = dict[str, Any]

_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


def cell_hash(identity: Row) -> str:
    """12 hex digits of SHA-256 over the canonical JSON of the hashed part of ``identity``."""
    text = json.dumps(plain(_hashed(identity)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def same_data(one: str, other: str) -> bool:
    """Whether two data fingerprints are of the same data, as far as they share tasks.

    Their parts are joined by ``+``: digests of what serves many tasks, which must be equal, and
    last, perhaps, ``task=digest,task=digest``. Recorded before there were such, a task's is not
    known.
    """
    (pinned, tasks), (others, theirs) = _data_parts(one), _data_parts(other)
    return pinned == others and all(tasks[each] == theirs[each] for each in tasks.keys() & theirs)


def _data_parts(fingerprint: str) -> tuple[list[str], dict[str, str]]:
    parts = [part for part in fingerprint.split("+") if part]
    pinned = [part for part in parts if "=" not in part]
    tasks = [each.rpartition("=") for part in parts if "=" in part for each in part.split(",")]
    return pinned, {task: digest for task, _, digest in tasks}


def setting(identity: Row) -> str:
    """What a cell shares with the dense cell it is compared to, as one canonical string."""
    shared = {key: value for key, value in _hashed(identity).items() if key not in METHOD_KEYS}
    return json.dumps(plain(shared), sort_keys=True, separators=(",", ":"))


def _hashed(identity: Row) -> Row:
    """What of an identity changes numbers."""
    return {
        key: value
        for key, value in identity.items()
        if key not in UNHASHED and not (key in ADDED and value == ADDED[key])
    }


@dataclass
class Cell:
    """The record of one cell.

    Attributes:
        identity: the keys of ``IDENTITY``.
        status: ``done`` or ``error``.
        accuracy, compute, routing, timing, samples: rows of the table of that name, without the
            identity.
        timing_level: how thoroughly it was timed: one of ``TIMING_LEVELS``.
        provenance: conditions that are no part of the identity (hardware, threads, duration).
        error: one line; empty when done.
        traceback: where the error came from; empty when done.
    """

    identity: Row
    status: str = "done"
    accuracy: list[Row] = field(default_factory=list)
    compute: list[Row] = field(default_factory=list)
    routing: list[Row] = field(default_factory=list)
    timing: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    timing_level: str = "off"
    provenance: Row = field(default_factory=dict)
    error: str = ""
    traceback: str = ""

    @property
    def key(self) -> str:
        """The cell's hash."""
        return cell_hash(self.identity)

    @property
    def evaluated(self) -> bool:
        """True if its evaluation came to an end (its timing may still be missing)."""
        return bool(self.accuracy)

    def lacks(self, timing: str) -> str:
        """What remains to be done: ``everything``, ``timing`` at that level, or ``nothing``."""
        if not self.evaluated:
            return "everything"
        if TIMING_LEVELS.index(self.timing_level) < TIMING_LEVELS.index(timing):
            return "timing"
        return "timing" if self.status == "error" else "nothing"


def order(cell: Cell) -> tuple[Any, ...]:
    """Sort key of the tables: by setting, method, parameters, recovery, target speedup and seed."""
    identity = cell.identity
    return (
        str(identity["model"]),
        setting(identity),
        str(identity["method"]),
        str(identity["phases"]),
        str(identity["parameters"]),
        # What was not recovered stands first.
        identity["recovery"] != NONE,
        str(identity["recovery"]),
        float(identity["target_speedup"]),
        int(identity["seed"]),
        cell.key,
    )


def identity_columns(cell: Cell) -> Row:
    """The columns that lead every row of the cell, ``LEADING``."""
    bound = bool(cell.provenance.get("uses_labels", False))
    own = {key: flat(cell.identity[key]) for key in IDENTITY}
    # As pip takes it; and a bare 5.24.0 is a date to a spreadsheet.
    own |= {key: f"{key}=={own[key]}" for key in VERSIONS}
    return {
        "cell": cell.key,
        **own,
        "bound": bound,
        "remote_code": cell.provenance.get("remote_code"),
    }


def flat(value: Any) -> Any:
    """An identity's value as one table entry: lists and mappings are joined by commas."""
    if isinstance(value, dict):
        # Sorted, as in the cell's file: a cell from memory and one from the disk must agree.
        entries = sorted(value.items())
        return ",".join(f"{key}={'all' if item is None else item}" for key, item in entries)
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def readable_name(identity: Row) -> str:
    """A file name that a person can find a cell by; the hash after it makes it unique."""
    text = "-".join(
        str(part)
        for part in (
            identity["method"],
            identity["parameters"],
            identity["phases"],
            f"x{identity['target_speedup']:g}",
            f"seed{identity['seed']}",
            "" if identity["recovery"] == NONE else shortened(identity["recovery"]),
        )
        if part != ""
    )
    return file_part(text)


def file_part(text: str) -> str:
    """``text`` as (a part of) a file name, at most 120 characters, on any system: no separator, no
    leading dot, no name that Windows gives to a device."""
    plain = re.sub(r"[^A-Za-z0-9._=-]+", "_", text)[:120].strip("_.")
    return f"id-{plain}" if _DEVICE.match(plain) else plain


def plain(value: Any) -> Any:
    """``value`` in plain JSON types: numpy's and torch's unwrapped, NaN and infinity None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)
