"""The page of an evaluation, drawn from the JSON that `evaluate` returns and from nothing else."""
