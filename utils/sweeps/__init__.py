"""Sweeps: tables of experiments, their folders, and the executors of their runs."""
