"""Utilities for all parts of the program; none names a method."""
