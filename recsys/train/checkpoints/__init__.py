"""Checkpoints in the store: format, lease, writing, resuming, and loading whole models."""
