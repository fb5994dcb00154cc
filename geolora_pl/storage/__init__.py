"""Adapters and checkpoints as values and as files."""
