"""Reports: the JSON that a stage writes, drawn as a self-contained page of HTML beside it. No number is computed here."""
