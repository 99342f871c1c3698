"""The start of a verb: its command line, Ray, checks before any worker starts, and the workers."""
