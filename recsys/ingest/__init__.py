"""Turns raw files into a dataset; `recsys.ingest.prepare` is the entry point."""
