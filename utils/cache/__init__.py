"""Disk cache of tensors and of the hashes of checked files; `python -m utils.cache` lists and empties it."""
