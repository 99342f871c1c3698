"""The command-line verbs, one module per stage."""
