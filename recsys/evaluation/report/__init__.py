"""The page of an evaluation, drawn from the JSON that `evaluate` returns."""
