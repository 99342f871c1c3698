"""Input files of many formats and layouts to Arrow tables, read in a memory-limited child process."""
