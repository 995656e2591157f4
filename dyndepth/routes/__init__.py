"""Which sublayers each token ran: a trace, and a recorded cell's method on its model again.

Stands on ``sweep``. Studies, plots and notebooks may import it.
"""
