"""Facts of the operating system and the interpreter that every process shares."""
