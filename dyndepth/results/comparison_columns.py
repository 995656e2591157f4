"""The columns of comparison.csv, curves.csv and equal_flops.csv, and what each means.

Each mapping is in the order of the table's columns.
"""

from __future__ import annotations

from dyndepth.cells.identity import CHAT, LEADING
from dyndepth.results.columns import IDENTITY

COMPARISON = {name: IDENTITY[name].description for name in LEADING} | {
    "status": "Of the cell: done, or error.",
    "task": "Name of the task; empty where the cell has no results.",
    "metric": "Name of the metric; `acc` and `acc_norm` are two metrics and never mixed.",
    "higher_is_better": "True where more is better.",
    "task_version": "Version of the task.",
    "value": "The metric over all documents.",
    "dense_value": "The metric of dense without recovery, in the same setting.",
    "difference": "`value` - `dense_value`.",
    "low": "Lower end of the difference's 95% interval, paired bootstrap over documents.",
    "high": "Upper end of that interval.",
    "retained": "`value` / `dense_value`; below 1 is worse only where more is better.",
    "retained_low": "Lower end of its 95% interval, paired bootstrap over documents.",
    "retained_high": "Upper end of that interval.",
    "block_fraction": "Executed / dense block FLOPs on this task.",
    "total_fraction": "Executed / dense FLOPs on this task, all causes counted.",
    "p": "Two-sided p of no difference.",
    "test": "`mcnemar` (exact) where every outcome is 0 or 1, else `bootstrap`.",
    "p_holm": "P after Holm's correction over all rows of this table with the same metric.",
    "n": "Documents, paired with dense.",
    "verdict": (
        "`better`, `worse` or `no difference shown`: the interval excludes 0 and `p_holm`"
        " is at most 0.05; `reference`: dense itself; `lossless`: dense's by construction, not "
        "tested; `not comparable`: see reason."
    ),
    "pareto": (
        "True where no competitor (same setting and recovery, no bound; seeds averaged) "
        "is as good at as few block FLOPs and better in either; empty for bounds and for what is "
        "lossless."
    ),
    "reason": "Why values are missing.",
}
"""Columns of comparison.csv, one row per cell x task x metric; a failed cell has one row."""

CURVE = {
    "setting": "12 hex digits that all curves share which were scored alike.",
    **{
        name: IDENTITY[name].description
        for name in (
            *("model", "model_fingerprint", "tokenizer_fingerprint", "method", "parameters"),
            *("phases", "recovery"),
            *("bound", "dtype", "device", "num_fewshot", *CHAT, "data_fingerprint", "dyndepth"),
            *("harness_code", "method_code"),
        )
    },
    "task": "Name of the task.",
    "metric": "Name of the metric; `acc` and `acc_norm` are two metrics and never mixed.",
    "higher_is_better": "True where more is better.",
    "task_version": "Version of the task.",
    "flops": (
        "What budgets count: `block` (attention and MLP sublayers), or `total`, with all that a "
        "method adds or cannot save: routers, exits, keys and values of skipped tokens, LM head."
    ),
    "n": "Documents, paired by all comparisons.",
    "points": "Target speedups that were measured, dense not counted.",
    "seeds": "The fewest seeds that any of its points averages.",
    "fraction_low": "The least executed / dense FLOPs that was measured.",
    "fraction_high": (
        "The largest; 1 where dense with the same recovery was run and the method saves FLOPs."
    ),
}
"""Columns that lead both tables of curves. A curve is all cells of one setting that differ only in
target speedup and seed; with dense of the same recovery as its point at full depth."""

CURVES = CURVE | {
    "area": "Mean value over the range: area under the curve (trapezoids) / the range's width.",
    "area_low": "Lower end of its 95% interval, bootstrap over documents.",
    "area_high": "Upper end of that interval.",
    "shared_low": (
        "Least fraction at which all competitors (same setting and recovery, no bounds) were "
        "measured: areas from there to `shared_high` can be read against each other."
    ),
    "shared_high": "Largest fraction at which all of them were.",
    "shared_area": "Mean value over that range; empty if it has no width.",
    "shared_area_low": "Lower end of its 95% interval, bootstrap over documents.",
    "shared_area_high": "Upper end of that interval.",
    "sdr": (
        "Speedup-degradation ratio, lower is better: 100 times the metric lost against dense "
        "without recovery, summed over the measured points faster than dense, divided by "
        "the sum of their speedups in percent, 100 (1 / fraction - 1)."
    ),
    "sdr_low": "Lower end of its 95% interval, paired bootstrap over documents.",
    "sdr_high": "Upper end of that interval.",
    "competitor": (
        "Of the competitors (same setting and recovery, no bounds) that against which the"
        " curve stands worst."
    ),
    "overlap_low": "Least fraction at which both curves were measured.",
    "overlap_high": "Largest fraction at which both were measured.",
    "area_difference": "Mean value over the overlap minus the competitor's.",
    "area_difference_low": "Lower end of its 95% interval, paired bootstrap over documents.",
    "area_difference_high": "Upper end of that interval.",
    "p": (
        "Two-sided bootstrap p, adjusted for the number of competitors: of none being better where "
        "the curve lies behind one, of not being better than all where it leads."
    ),
    "p_holm": (
        "P after Holm's correction over all rows of this table with the same metric and `flops`."
    ),
    "verdict": (
        "`better`, `worse` or `no difference shown` against the competitor: the interval "
        "excludes 0 and `p_holm` is at most 0.05; `not comparable`: see reason."
    ),
    "failed": "Hashes of the curve's failed cells.",
    "cells": "Hashes of the cells that went in.",
    "reason": "Why values are missing.",
}
"""Columns of curves.csv, one row per curve x task x metric x kind of FLOPs."""

EQUAL_FLOPS = CURVE | {
    "reference_speedup": "The budget: dense / executed FLOPs, of the kind in `flops`.",
    "fraction": "The same as a fraction of dense's FLOPs, 1 / reference_speedup.",
    "value": (
        "The metric there, interpolated document by document between the two neighbouring"
        " measured points; empty outside of them."
    ),
    "low": "Lower end of its 95% interval, bootstrap over documents.",
    "high": "Upper end of that interval.",
    "dense_value": "The metric of dense without recovery.",
    "difference": "`value` - `dense_value`.",
    "difference_low": "Lower end of its 95% interval, paired bootstrap over documents.",
    "difference_high": "Upper end of that interval.",
    "rank": (
        "Place among the competitors at this budget, 1 is best, equals share the better "
        "place; empty for bounds."
    ),
    "competitors": "How many competitors (same setting and recovery, no bounds) reach this budget.",
    "competitor": "The best of the others.",
    "competitor_value": "Its value at this budget.",
    "competitor_difference": "`value` - `competitor_value`.",
    "competitor_difference_low": "Lower end of its 95% interval, paired bootstrap over documents.",
    "competitor_difference_high": "Upper end of that interval.",
    "p": (
        "Two-sided bootstrap p, adjusted for the number of competitors: of none being better where "
        "the curve lies behind one, of not being better than all where it leads."
    ),
    "p_holm": (
        "P after Holm's correction over all rows of this table with the same metric and `flops`."
    ),
    "verdict": (
        "`better`, `worse` or `no difference shown` against the competitor: the interval "
        "excludes 0 and `p_holm` is at most 0.05; `not comparable`: see reason."
    ),
    "failed": "Hashes of the curve's failed cells.",
    "cells": "Hashes of the cells that went in.",
    "reason": "Why values are missing.",
}
"""Columns of equal_flops.csv, one row per curve x task x metric x kind of FLOPs x budget."""

TYPES = {
    **dict.fromkeys(("setting", "status", "task", "metric", "task_version", "flops"), "text"),
    **dict.fromkeys(("test", "verdict", "competitor", "failed", "cells", "reason"), "text"),
    **dict.fromkeys(("n", "points", "seeds", "rank", "competitors"), "integer"),
    **dict.fromkeys(("higher_is_better", "pareto"), "boolean"),
}
"""Types of these columns; what is not here is a number."""

ALWAYS = frozenset({"setting", "model", "method", "phases", "recovery", "verdict"})
"""Columns that are never empty."""
