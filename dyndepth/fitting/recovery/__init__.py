"""Stage 2: adapters trained under a method's frozen gates or together with its routers, and kept.

Stands on the rest of ``fitting``. It counts for the digests of recovered cells alone.
"""
