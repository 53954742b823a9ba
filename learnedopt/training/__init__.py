"""The outer loop, its checkpoints and its trackers. Imports the core."""
