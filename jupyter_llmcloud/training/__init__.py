"""Runs in a rank: the shell, the process group, the `run` object, what a cell leaves behind."""
