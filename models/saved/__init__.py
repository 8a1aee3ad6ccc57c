"""Runs in their folders: read, rebuilt from checkpoints, extended, looked at again, used and exported."""
