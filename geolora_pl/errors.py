"""The category of all warnings of this package, and how errors of other libraries are quoted."""


class GeoLoRAWarning(UserWarning):
    """A warning about something that the user should know but that does not stop the run."""


def in_one_line(error: Exception) -> str:
    r"""What an error says, in one line; its class if it says nothing.

    Example:
        >>> in_one_line(ValueError("first\n  second")), in_one_line(KeyError())
        ('first second', 'KeyError')
    """
    return " ".join(str(error).split()) or type(error).__name__
