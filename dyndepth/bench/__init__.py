"""The suite's own speed, held against arithmetic limits and lm-eval's own model class.

Stands on ``timing``, ``evaluation`` and ``sweep``. Its command and ``gpu`` import it.
"""
