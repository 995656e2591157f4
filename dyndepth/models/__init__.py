"""A Hugging Face model as blocks of two residual branches: loading it, the table of families, the
branches on all tokens or on some, and a digest of what it computes.

Stands on ``common`` and ``data``. Everything that runs a model may import it.
"""
