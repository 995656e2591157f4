"""What makes a cell that cell: the keys of its identity, their hash, and when two agree.

An identity holds everything that changes the numbers. Its hash names the cell, so that a finished
one is found again and never computed twice.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

CHAT = (
    *("apply_chat_template", "chat_template_fingerprint", "fewshot_as_multiturn"),
    "system_instruction",
)
"""Keys that say how prompts are put; all of them are empty where that is plain text."""

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
    *CHAT,
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

LEADING = ("cell", *IDENTITY, "bound", "lossless", "remote_code")
"""The columns that lead every table: the cell's hash, its identity, ``bound``, True where the
method sees labels: a bound, no competitor, ``lossless``, True where it drafts what the whole model
verifies: no competitor either, for it saves no FLOPs, and ``remote_code``, True where code that
came with the model had been loaded, None where nobody looked."""

UNHASHED = frozenset({"model", "git_commit"})
"""Part of every row, but not of the hash: where the weights lie is no matter of their values
(``model_fingerprint`` is), and a commit that touches no hashed code changes no number."""

ADDED = {"tokenizer_fingerprint": "", **dict.fromkeys(CHAT, "")}
"""Keys that cells recorded before do not have, and as what they are read there. As long as a key
says no more than that, it is no part of a hash."""

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

Row = dict[str, Any]


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


def flat(value: Any) -> Any:
    """An identity's value as one table entry: lists and mappings are joined by commas."""
    if isinstance(value, dict):
        # Sorted, as in the cell's file: a cell from memory and one from the disk must agree.
        entries = sorted(value.items())
        return ",".join(f"{key}={'all' if item is None else item}" for key, item in entries)
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


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


FORMER = {
    "b779a8c7124b0a85": "f4a0f9de1bbb944f",
    "2588359b2a4d041a": "549a0f3b3403f6da",
}
"""Digests by an earlier definition that committed results were recorded with, and what they are
today: the embedded model's, and its corpus's. Neither a weight nor a text has changed."""


def today(recorded: str) -> str:
    """A digest, perhaps ``recorded`` by an earlier definition, as it is by that of today."""
    return FORMER.get(str(recorded), recorded)


def agrees(key: str, recorded: str, here: str) -> bool:
    """Whether an identity's digest, perhaps ``recorded`` by an earlier definition or before there
    was such a ``key``, is of the very thing that is found ``here``."""
    if key == "data_fingerprint":
        return same_data(recorded, here)
    return recorded == ADDED.get(key, here) or today(recorded) == here
