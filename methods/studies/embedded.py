"""Every method and control on the embedded model: the run of the leaderboard.

200 documents a task of the whole offline suite, so that the 95% interval of an accuracy is at most
7 points to either side; three seeds where a method draws at random. A dense cell reads some 140,000
tokens. Wall-clock is measured for the first seed alone: the others execute as much.
"""

from __future__ import annotations

from dyndepth.studies import Study

BUDGETS = (1.1, 1.25, 1.5, 2.0)
WIDE = (*BUDGETS, 3.0)
"""Of methods that need no training and reach it."""

DRAWN = "random_skip,random_mask"
"""Methods that draw at random."""

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
        {"methods": "skipgpt", "speedups": BUDGETS, "recovery": ("none", "lora"), "timing": "full"},
        {
            "methods": "uls(spacing=even),uls,static_pruning,static_pruning(criterion=greedy)",
            "speedups": WIDE,
            "timing": "full",
        },
        {
            "methods": "early_exit,early_exit(confidence=saturation)",
            "speedups": WIDE,
            "timing": "full",
        },
        {"methods": DRAWN, "speedups": BUDGETS, "timing": "full"},
        {
            "methods": "skipgpt(reads=constant, windows=16),layer_controller,"
            "layer_controller(reads=constant)",
            "speedups": BUDGETS,
            "timing": "full",
        },
        {"methods": DRAWN, "speedups": BUDGETS, "seed": (1, 2)},
        # What it saves is its result, so that it has one cell.
        {"methods": "exit_oracle", "speedups": (1.25,)},
        {"methods": "oracle(depths=6)", "speedups": BUDGETS},
    ),
    claims=(),
)
