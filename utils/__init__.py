"""Utilities for any part of the program, which know no method by name."""
