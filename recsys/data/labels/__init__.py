"""What events mean: labels of tasks, exposures, seen items, groups of users."""
