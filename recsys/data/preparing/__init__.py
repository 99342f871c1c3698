"""Raw tables to the shards of a dataset; `recsys.data.prepare` is the way in."""
