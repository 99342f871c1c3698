"""Raw files to a dataset; `recsys.ingest.prepare` is the entry point."""
