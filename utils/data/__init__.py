"""Data sets, their images, the task sequence, and the views that are network inputs."""
