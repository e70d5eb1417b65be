"""How much memory a training step takes, found by running it on tensors without data."""
