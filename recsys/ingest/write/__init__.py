"""Builds the tables of a dataset from clean events: splits, sequences, catalogue and statistics."""
