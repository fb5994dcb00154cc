"""This folder has the sources of texts."""
