"""Faults in numbers: `python -m tests.chaos [stops] [starts] [checkpoints] [leaders] [serving] [soak] [fuzz] [marked]`. Too long for every test run."""
