"""What a training step costs in time and memory, and which of its parts cost how much."""
