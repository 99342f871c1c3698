"""Monitoring of a run: progress, time, memory, FLOPs, profiles and trackers."""
