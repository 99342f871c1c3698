"""Recovery from worker failures: restarts, and a watchdog for ranks that hang."""
