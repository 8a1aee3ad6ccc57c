"""Sweeps: a table of experiments, where each stands, and what executes its runs."""
