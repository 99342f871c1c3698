"""What a run tells about itself: progress, time, memory, FLOPs, profiles, trackers and its report."""
