"""What all benchmarks share: tasks, methods, one training loop, sweeps of it, summaries of what they found, figures."""
