"""Faults in numbers: `python -m tests.chaos [stops] [starts] [checkpoints] [soak]`. Too long for every test run."""
