"""A method's model as files that others load: plain checkpoints, and fitted methods in a folder.

Each export is written beside its place, read back in another process, compared with the attached
model, and given its name only when both agree. Imports everything up to ``sweep``; imported by
nobody.
"""
