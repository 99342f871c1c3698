"""Training: the loop, the engine and checkpoints."""
