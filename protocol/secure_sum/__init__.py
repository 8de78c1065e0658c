"""Secure sum: the coordinator learns the sum of what nodes send and nothing else."""
