"""What happened since the export: an ordered log of changes, and every replica's copy of what it says of users."""
