"""Under which conditions the rows of a leaderboard were measured, for people."""

from __future__ import annotations

from collections.abc import Sequence

from dyndepth.cells.identity import CHAT, Row
from dyndepth.cells.recipe import NONE
from dyndepth.common.provenance import VERSIONS

CONDITIONS = (
    *("model", "model_fingerprint", "tokenizer_fingerprint", "dtype", "device", "device_name"),
    "threads",
    *("attn_implementation", "batch_size", "tasks", "num_fewshot", "limit", "sample_seed"),
    *CHAT,
    *("data_fingerprint", "dyndepth", "harness_code", "git_commit"),
    *("torch", "transformers", "lm_eval"),
)
"""What is told of the cells beneath the table, each value once."""

EMPTY = dict.fromkeys(CHAT, NONE) | {"limit": "all", "num_fewshot": "by task"}
"""What a condition without value says where other cells have one."""


def conditions(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Of each of ``CONDITIONS`` that some of a leaderboard's ``rows`` have the values, sorted; last
    what others say that have none."""
    found = {}
    for key in CONDITIONS:
        values = {str(row.get(key)) for row in rows if row.get(key) not in (None, "")}
        empty = any(row.get(key) in (None, "") for row in rows)
        if key in VERSIONS:
            values = {value.removeprefix(f"{key}==") for value in values}
        if values:
            # What holds for some alone must not be read as what holds for all.
            found[key] = sorted(values) + [EMPTY.get(key, "not recorded")] * empty
    return found
