"""Other versions and other libraries: `core` is what `make compat` runs with the oldest and the newest we allow."""
