"""Reports: draws the JSON that a stage writes as a self-contained HTML page next to it. No number is computed here."""
