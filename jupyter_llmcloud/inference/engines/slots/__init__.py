"""The engine for CPUs: every sequence has a slot for its keys and values, and all of them share each forward pass."""
