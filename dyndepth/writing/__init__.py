"""A text written by a model under a method, and what writing it came to.

Stands on ``fitting`` and ``runtime``. Plots and notebooks may import it. ``dyndepth.generate`` is
its function, and the command of that name its door.
"""
