"""What is trained: each objective has a module, its batches, its losses by name, and its validation."""
