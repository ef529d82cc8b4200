"""The error of a user who gave something that cannot be used."""


class InputError(ValueError):
    """The input is wrong. One line: what is wrong, where, what was expected, what to do.

    The scripts print it as ``error: ...`` and end with exit code 2, without a traceback.
    """


def interpolation_error(text: str) -> str | None:
    """Return what a resolver said, out of OmegaConf's message around it; None for another message."""
    _, found, said = text.partition("\n")[0].partition(" raised while resolving interpolation: ")
    return said if found else None
