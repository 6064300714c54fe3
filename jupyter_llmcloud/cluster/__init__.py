"""Talks to Dask: starts clusters in processes of their own, finds their node agents, places ranks."""
