"""Reading datasets: manifest, plan, shards, batches and the catalogue."""
