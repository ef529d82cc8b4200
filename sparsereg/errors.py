"""The error of a user who gave something that cannot be used."""


class InputError(ValueError):
    """The input is wrong. One line: what is wrong, where, what was expected, what to do.

    The scripts print it as ``error: ...`` and end with exit code 2, without a traceback.
    """
