"""A row for PEFT's own comparison of methods on MetaMathQA."""
