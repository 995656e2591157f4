"""Scores, FLOPs and routing of a method on tasks; for bounds, the outcomes of many plans.

Stands on ``runtime`` and ``tasks``. Whoever scores a method may import it; all of it
counts for every cell's digest.
"""
