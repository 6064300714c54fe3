"""Models made smaller, measured and exported: in a process of its own, which is started by module name."""
