"""Prepares data on a cluster: a graph of Dask tasks, one per partition, each carried out in a process of its own."""
