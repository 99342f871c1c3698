"""The data report: counts per partition, checks, plots, and one page of HTML."""
