"""What a run reports: progress, time, memory, FLOPs, profiles, trackers, and its page."""
