"""Everything that is a function of cells: the tidy tables and what their columns mean, the
leaderboard and its pages, comparisons, published values, numbers as text; ``statistics`` has
intervals, curves and tests.

Stands on ``cells`` and needs no model. Whoever shows or checks results may import it.
"""
