"""What a method's fit may use: calibration on text, the training loop, routers, regression, removal
and importance of units, and fits that are kept; ``recovery`` trains adapters under a method's
gates.

Stands on ``runtime``. Methods and whoever fits them may import it; its files count for the digests
of the methods that import them.
"""
