"""Starts a verb: command line, Ray, checks before workers start, and the workers."""
