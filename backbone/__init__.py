"""Neural modules that take plain numbers and tensors; nothing here imports another package of this repository."""
