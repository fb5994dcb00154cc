"""The one category of warnings that this package gives, so that it can be filtered or turned into an error."""


class GeoLoRAWarning(UserWarning):
    """Something about the adapters that the user should know and that does not stop the run."""
