"""Which ranks this package finds, and why its defaults are what they are."""
