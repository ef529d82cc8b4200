"""The error of a user who gave something that cannot be used."""

import re


class InputError(ValueError):
    """The input is wrong. One line: what is wrong, where, what was expected, what to do.

    The scripts print it as ``error: ...`` and end with exit code 2, without a traceback.
    """


def interpolation_error(text: str) -> str | None:
    """Return what a resolver said, out of OmegaConf's message around it; None for another message."""
    _, found, said = text.partition("\n")[0].partition(" raised while resolving interpolation: ")
    return said if found else None


def type_error(text: str, key: str | None = None) -> str | None:
    """Return ``key=value: expected ...`` out of OmegaConf's message on a wrong type; None for another one.

    Args:
        text: what OmegaConf says.
        key: the setting; by default the one that OmegaConf names.
    """
    said = r"(?:of type '.*' could not be converted to|of type '.*' is incompatible with|is not a valid)"
    wrong = re.match(rf"Value '(.*)' {said} (.*)", text)
    named = re.search(r"full_key: (\S+)", text)
    key = key or (named.group(1) if named else None)
    if wrong is None or key is None:
        return None
    value, kind = wrong.groups()
    kinds = {"Integer": "an integer", "Float": "a number", "bool (type str)": "true or false"}
    expected = "a number" if "float" in kind else kinds.get(kind, kind)
    return f"{key}={value}: expected {expected}"
