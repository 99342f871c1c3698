"""Full-ranking evaluation and its metrics."""
