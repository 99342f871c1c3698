"""The verbs: one module per stage, each over `recsys`."""
