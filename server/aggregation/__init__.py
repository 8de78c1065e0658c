"""Aggregation rules, one per file, each behind ``begin`` / ``add`` / ``finalise``."""
