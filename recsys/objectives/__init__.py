"""Training objectives: each has a module, batches, losses by name, and validation."""
