"""The keys every run has, and loading of configs: JSON files checked with every mistake reported at once."""
