"""Faults in numbers: `python -m tests.chaos [stops] [kills] [saves] [starts] [soak]`. Too long for every test run."""
