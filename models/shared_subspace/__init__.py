"""Shared-subspace experiment on compositional 8x8 grids; `learner.py` is its entry."""
