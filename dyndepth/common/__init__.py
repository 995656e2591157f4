"""What everybody stands on: errors, paths and files, specifications, the registry of methods,
commands, and where a number comes from (versions, digests of code).

Imports nothing of the project but the contract's types, and no torch. Everybody may import it.
"""
