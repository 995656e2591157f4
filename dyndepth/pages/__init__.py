"""What README and docs say of methods, tables and results: cards and blocks made from committed
tables.

Stands on ``results`` and ``studies``. Its command alone imports it.
"""
