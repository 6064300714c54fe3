"""Why a model answers so, and what throws it off: a process of its own, started by module name."""
