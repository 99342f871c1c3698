"""Input files of many formats and layouts to Arrow tables, read in a child process that a hostile file cannot take down."""
