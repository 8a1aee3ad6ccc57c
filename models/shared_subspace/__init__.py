"""The shared-subspace experiment on compositional 8x8 grids, whole; entered through its learner."""
