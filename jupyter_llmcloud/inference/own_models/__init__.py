"""Models of the user's own making: an architecture of a cell, or an object of a kernel."""
