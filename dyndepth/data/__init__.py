"""What is read: pinned downloads, calibration and training text, what tokenizers do, and how much
text a model takes.

Stands on ``common``. Everybody but ``common`` and ``cells`` may import it.
"""
