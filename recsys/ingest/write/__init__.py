"""Clean events to the tables of a dataset: splits, sequences, catalogue and statistics."""
