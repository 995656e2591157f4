"""How far methods stay below bounds that choose by the answers: the run behind notebook 05.

Bounds read every document many times over (a passage some 30 s on one core), and would write a text
once for each route that they may take; so there are fewer documents than in the main run, and no
generation.
"""

from __future__ import annotations

from dyndepth.methods.studies import findings
from dyndepth.studies.study import Study

BUDGETS = (1.25, 1.5)

STUDY = Study(
    name="bounds",
    title="Methods against bounds that choose by the answers",
    limit={"socialiqa": 100, "quartz": 100, "last_word": 100, "wikipedia_bpb": 30},
    sweeps=(
        {
            "methods": "skipgpt,static_pruning(criterion=greedy),"
            "early_exit(confidence=saturation),uls(spacing=even)",
            "speedups": BUDGETS,
        },
        # What it saves is its result, so that it has one cell.
        {"methods": "exit_oracle", "speedups": (1.25,)},
        {"methods": "oracle(depths=6)", "speedups": (1.1, 1.25, 1.5, 2.0)},
    ),
    claims=(),
    findings=findings.bounds,
)
