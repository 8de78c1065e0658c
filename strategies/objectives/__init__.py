"""WHAT is optimised: one file per objective."""
