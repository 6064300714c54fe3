"""Sweeps in a notebook: started, followed, shown; range tests of learning rates and batch sizes."""
