"""Raw events to clean ones: identifiers, text, times, rules, and what they reject."""
