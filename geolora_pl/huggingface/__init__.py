"""Everything that knows the Trainer of transformers; nothing here needs Lightning."""
