"""Decisions by metrics: which are possible, and which version is served."""
