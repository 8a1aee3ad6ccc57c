"""A saved run in use: predictions for any images, and exports that need none of this program."""
