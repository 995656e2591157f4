"""Intervals, curves over compute, differences on the same documents, and verdicts.

Numbers in, numbers out. The rest of ``results``, and studies, may import it.
"""
