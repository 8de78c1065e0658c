"""WHAT is trainable: one file per family of methods."""
