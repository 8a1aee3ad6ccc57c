"""Configs of the methods, one file each; none imports PyTorch, so that mistakes are answered at once."""
