"""Objects of a cell as a graph: compared whole, with what they share, and put back in place.

`digest` is what checkpoints compare by today. The rest (`graph`, `kinds`, `tensors`, `memory`, `state`, `restore`,
`liveness`) saves and restores any object by its parts, or refuses it by name; it is tested by values and is not what
the checkpointer saves with yet.
"""
