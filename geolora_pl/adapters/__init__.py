"""One layer and its adapter, and where adapters go in a model."""
