"""What is computed once and kept on disk: tensors, hashes of files. `python -m utils.cache` lists it."""
