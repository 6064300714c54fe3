"""Sweeps: each is seen to by this server, and needs no kernel."""
