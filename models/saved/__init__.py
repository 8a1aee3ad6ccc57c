"""Saved runs: read, rebuilt from checkpoints, extended, inspected, used for predictions and exported."""
