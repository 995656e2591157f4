"""What a user got wrong, and what went wrong with a run."""

from __future__ import annotations


class UserError(Exception):
    """Wrong input or a missing precondition, told in one sentence that names culprit and remedy.

    Command lines print the sentence to stderr and leave with exit status 2.
    """


class NothingSkipped(UserWarning):
    """A method that is meant to skip ran, and every token executed every block."""


class MethodFault(TypeError):
    """A method answered what the contract does not allow; names the method, file and line."""


class RunFailed(Exception):
    """A run that cannot go on, told in one sentence: a full disk, workers that keep dying.

    Command lines print the sentence to stderr and leave with exit status 1.
    """
