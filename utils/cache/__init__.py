"""What is computed once and kept on disk: tensors, decoded images, hashes of files. `python -m utils.cache` lists it."""
