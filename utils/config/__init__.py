"""Configs: the keys of every run, and loading of JSON files with all mistakes reported at once."""
