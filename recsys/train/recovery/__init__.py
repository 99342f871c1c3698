"""What happens when workers fail: restarts, and the watchdog of ranks that hang."""
