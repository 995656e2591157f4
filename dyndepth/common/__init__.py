"""What everybody stands on: errors, paths and files, specifications, the registry of methods,
commands and their tables, modes, where a number comes from (versions, digests of code), and a
memory allocator that is kept steady.

Imports nothing of the project but the contract's types, and no torch. Everybody may import it.
"""
