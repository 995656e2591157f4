"""Ten minutes of somebody's GPU: what is checked and measured there, and what is then said of it.

Stands on ``bench``. Its command and ``pages`` alone import it.
"""
