"""Data for ranks: prepared shards, and data sets there are already, each row once an epoch on any number of ranks."""
