"""Who is told how a sweep goes on: people, a JSON log, experiment trackers.

``interface`` is what all of them implement; ``choice`` picks them. The sweep imports it.
"""
