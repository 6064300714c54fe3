"""Rules of a sweep: which trial runs next, when it ends; what a range test says of learning rates and batch sizes."""
