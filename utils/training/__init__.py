"""Training utilities: optimizer groups, devices and precision, random streams, several processes."""
