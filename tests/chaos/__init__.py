"""Faults in numbers: `python -m tests.chaos [stops] [starts] [checkpoints] [leaders] [serving] [soak] [marked]`. Too long for every test run."""
