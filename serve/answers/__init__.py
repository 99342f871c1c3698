"""Turns requests into answers of one version: who asks, which items, and what is said of them. No Ray, no HTTP."""
