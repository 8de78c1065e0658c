"""Differential privacy of nodes: what a release costs, what it is clipped to, the noise on it, the book kept of it."""
