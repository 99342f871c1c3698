"""The report of a dataset: counts per partition, checks, plots, and the page."""
