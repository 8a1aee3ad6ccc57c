"""A run on disk: its folder, record, checkpoints, metrics and figures."""
