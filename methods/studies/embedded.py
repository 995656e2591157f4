"""Every method and control on the embedded model: the run of the leaderboard.

200 documents per task of the whole offline suite, so that the 95% interval of an accuracy is at
most 7 points to either side; three seeds where a method draws at random. A dense cell reads some
140,000 tokens. Wall-clock is measured of one target, where methods can be read beside each other:
to be sure of 3% takes some ten minutes per cell. What bounds could do is another study, ``bounds``.
"""

from __future__ import annotations

from dyndepth.methods.studies import findings
from dyndepth.studies.study import Study

BUDGETS = (1.1, 1.25, 1.5, 2.0)
WIDE = (*BUDGETS, 3.0)
"""Of methods that need no training and reach it."""

DRAWN = "random_skip,random_mask"
"""Methods that draw at random."""

TIMED = (
    "skipgpt,static_pruning,static_pruning(criterion=greedy),uls(spacing=even),early_exit,"
    "early_exit(confidence=saturation),layer_controller,random_mask"
)
"""Every way to skip; a method's other settings execute in the same way."""

STUDY = Study(
    name="embedded",
    title="Every method and control on the embedded model",
    limit={
        "socialiqa": 200,
        "quartz": 200,
        "last_word": 200,
        "wikipedia_bpb": 200,
        "title_generation": 200,
    },
    sweeps=(
        {"methods": "skipgpt", "speedups": BUDGETS, "recovery": ("none", "lora")},
        {
            "methods": "uls(spacing=even),uls,static_pruning,static_pruning(criterion=greedy)",
            "speedups": WIDE,
        },
        {"methods": "early_exit,early_exit(confidence=saturation)", "speedups": WIDE},
        {
            "methods": "skipgpt(reads=constant, windows=16),layer_controller,"
            "layer_controller(reads=constant)",
            "speedups": BUDGETS,
        },
        {"methods": DRAWN, "speedups": BUDGETS, "seed": (0, 1, 2)},
        {"methods": TIMED, "speedups": (1.5,), "timing": "full"},
        {"methods": "uls(spacing=even)", "speedups": (1.25,), "timing": "full"},
    ),
    claims=(),
    findings=findings.embedded,
)
