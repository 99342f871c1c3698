"""Raw tables to the shards of a dataset; `recsys.ingest.prepare` is the way in."""
