"""The clock: interleaved pairs of passes, what a time depends on, from which skipped fraction
routing pays.

Stands on ``runtime``. Sweeps, benches and its own command may import it; no scored number
runs through it.
"""
