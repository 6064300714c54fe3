"""A cell before it starts, in processes of its own that are thrown away: measured, or rehearsed on two ranks."""
