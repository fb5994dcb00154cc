"""What needs a GPU: the tests that no CPU can run, and a training on a whole data set."""
