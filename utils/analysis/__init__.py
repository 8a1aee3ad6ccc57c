"""Analyses of representations: similarity, subspaces, linear probes, and their figures."""
