"""Tests, laid out as the source."""

from utils.training.late_compiler import import_networks

import_networks()  # as the command line does: a process of tests starts a second earlier
