"""Checkpoints in the store: their format, who may write them, resuming from them, and loading them as whole models."""
