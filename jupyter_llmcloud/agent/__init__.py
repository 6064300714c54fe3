"""The node agent: our supervisor process on a worker's host. Owns ranks, replicas and the world's store; no torch."""
