"""Claims and the sweeps that they need, what was measured for them, and reports.

Stands on ``routes`` and ``results``. Methods may import ``study`` to declare a study; pages quote
reports.
"""
