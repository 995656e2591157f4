"""The grid of cells and who computes it: settings, cells of a grid, the driver, executors and their
workers, and the way back from a cell to its command; ``progress`` tells people and programs.

Stands on everything that makes a cell. What makes cells, or works on recorded ones, may import it.
"""
