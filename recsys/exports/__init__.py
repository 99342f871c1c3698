"""Exports: immutable versions of a model that a service can load, and the aliases that point to them."""
