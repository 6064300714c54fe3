"""A trial of a sweep as its cell sees it; range tests of learning rates and batch sizes."""
