"""A method attached to a model: its gates executed block by block, the cache, the ledger of FLOPs,
and many static plans in one forward.

Stands on the contract and ``models``. Fits, scores, times and methods may import it.
"""
