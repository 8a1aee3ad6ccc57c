"""Methods of the field to compare with, one file each."""
