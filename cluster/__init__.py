"""Declarations that put the system on a cluster; no code."""
