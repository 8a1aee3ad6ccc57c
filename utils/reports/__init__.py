"""Reports of sweeps: statistics over seeds, hypotheses, tables and figures."""
