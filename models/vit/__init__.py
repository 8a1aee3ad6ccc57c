"""Shared parts of the class-incremental methods on a frozen ViT."""
