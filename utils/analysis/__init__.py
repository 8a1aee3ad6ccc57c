"""Analyses of representations and scores: similarity, subspaces, linear probes, calibration, and figures."""
