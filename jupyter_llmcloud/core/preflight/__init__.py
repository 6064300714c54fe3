"""What a run needs before it starts: memory and time of a step, and what would make its ranks wait for each other."""
