"""Training: the loop, the engine, checkpoints, recovery and monitoring."""
