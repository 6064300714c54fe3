"""Objects of a cell as a graph: compared whole, with what they share, saved by value, and put back in place.

What a variable leads to is taken apart by its kind; what has changed since the training began is saved, and what has
changed and cannot be saved is refused by name.
"""
