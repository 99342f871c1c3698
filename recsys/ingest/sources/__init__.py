"""Reads input files of many formats and layouts as Arrow tables, in a memory-limited child process."""
