"""What a cell is: its identity and hash, its specification, its record, its file on the disk, its
name for people, and several runs as one.

Stands on ``common``. Whoever makes, reads or shows results may import it; what scores does not.
"""
