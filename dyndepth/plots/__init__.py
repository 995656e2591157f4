"""Every figure, once: the notebooks and commands call these and draw nothing themselves.

Each function takes tables or records, returns a matplotlib Figure and writes it to ``path`` if one
is given (PNG, PDF or SVG, by its ending). ``python -m dyndepth.plots RUN`` writes every figure that
a run's tables allow. Doors and notebooks may import it: nothing is measured here.
"""

from dyndepth.plots.fits import importance, training_curve
from dyndepth.plots.retention import bound_gap, gaps, retained, retained_by_task
from dyndepth.plots.rounds import drafts
from dyndepth.plots.routes import (
    executed_by_layer,
    executed_by_position,
    executed_in_run,
    routing_heatmap,
)
from dyndepth.plots.runs import read_runs
from dyndepth.plots.scores import accuracy_vs_flops, accuracy_vs_wallclock, flops_vs_wallclock
from dyndepth.plots.shares import acceptance
from dyndepth.plots.style import readable, written
from dyndepth.plots.tables import (
    main_metric,
    on_front,
    points,
    read_tables,
    reference,
    task_table,
)
from dyndepth.plots.texts import text_route

__all__ = [
    "acceptance",
    "accuracy_vs_flops",
    "accuracy_vs_wallclock",
    "bound_gap",
    "drafts",
    "executed_by_layer",
    "executed_by_position",
    "executed_in_run",
    "flops_vs_wallclock",
    "gaps",
    "importance",
    "main_metric",
    "on_front",
    "points",
    "read_runs",
    "read_tables",
    "readable",
    "reference",
    "retained",
    "retained_by_task",
    "routing_heatmap",
    "task_table",
    "text_route",
    "training_curve",
    "written",
]
