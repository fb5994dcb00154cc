"""This folder has adapters and checkpoints, as values and as files."""
