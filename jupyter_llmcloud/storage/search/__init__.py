"""Sweeps on disk: their records, and the study in which Optuna keeps what was tried."""
