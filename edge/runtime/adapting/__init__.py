"""A device learns: an adapter of its own, trained from the bundle's weights, kept only where it is better."""
