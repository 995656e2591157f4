"""The one exception for what a user got wrong."""


class UserError(Exception):
    """Wrong input or a missing precondition, told in one sentence that names culprit and remedy.

    Command lines print the sentence to stderr and leave with exit status 2.
    """
