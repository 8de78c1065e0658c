"""Whole federations in one process: grid, partitions, demo institutions."""
