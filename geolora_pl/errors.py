"""The category of all warnings of this package, so that they can be filtered or turned into errors."""


class GeoLoRAWarning(UserWarning):
    """A warning about something that the user should know but that does not stop the run."""
