"""The tests, what they share (`leaks`), and the drivers of `make bench` and `make chaos`."""
