"""A decoder of the Llama family in as few operations as it needs."""
