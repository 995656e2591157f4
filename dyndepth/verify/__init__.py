"""Is a run what it says? Files, rows and tables against each other, and cells computed again.

Stands on ``sweep`` and ``results``. Its command alone imports it.
"""
