"""What a sweep will cost, before it runs: seconds, memory and disk, and what was assumed for them.

``machines`` says how fast a machine is (measured here, or off a data sheet), ``texts`` which tokens
the tasks are, ``passes`` which forwards read them, ``costs`` what those and the fits take,
``memory`` what must fit, and ``report`` prints it. Only a dry run comes here.
"""
