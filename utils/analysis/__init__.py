"""Looks at representations: similarity, subspaces, linear probes, and the figures of what they find."""
