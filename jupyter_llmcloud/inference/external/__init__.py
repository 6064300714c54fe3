"""Servers of others as engines: started and watched here, or elsewhere; our replica stands before them.

commands  how vLLM and llama.cpp are started
server    one such server: its process, its health, its connections
forward   a request passed on, with our key, name, counts and errors
"""
