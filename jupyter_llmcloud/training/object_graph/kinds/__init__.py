"""The kinds of objects, and which kind an object is of."""
