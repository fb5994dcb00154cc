"""Text from files, which may hold what a terminal takes for a command."""


def printable(text: str) -> str:
    r"""A text of which every character can be shown; others are written as Python writes them in a string.

    Example:
        >>> print(printable("red \x1b[31m"))
        red \x1b[31m
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
