"""Cleans raw events: ids, text, times, and the rules that reject rows."""
