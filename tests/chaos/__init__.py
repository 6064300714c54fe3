"""Faults in numbers: `python -m tests.chaos [stops] [starts] [checkpoints] [leaders] [soak]`. Too long for every test run."""
