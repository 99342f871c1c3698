"""The seeded generator of `data.source = "synthetic"`."""
