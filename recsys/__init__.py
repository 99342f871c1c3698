"""A distributed training and serving system for LLM-plus-recommender models."""

__version__ = "0.1.0"
