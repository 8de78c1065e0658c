"""parity.md: what a bundle was compared with, how far it is from it, and the bounds that it was held to."""

from collections.abc import Mapping, Sequence

from edge.parity import AT_LEAST
from edge.runtime.manifest import BundleManifest, Parity

_COLUMNS = ("texts", "positions", "largest difference", "largest output", "KL", "top-1", "perplexity ratio", "cosine", "rows")
_LARGE = 1000
_ABOUT = {
    "difference": "largest difference of two outputs, as a share of the largest output where that is above 1",
    "kl": "KL(model || bundle) in nats, the mean over positions",
    "top1": "share of positions with the same likeliest token or label",
    "perplexity_ratio": "the bundle's perplexity over the model's",
    "cosine": "cosine of the two models' outputs",
    "metric_loss": "accuracy lost on given rows; one answer may always turn",
}


def report(manifest: BundleManifest, against: str, of: Mapping[str, Parity], loose: Sequence[str]) -> str:
    """The report as Markdown.

    Args:
        manifest: Of the bundle.
        against: What it was compared with.
        of: Figures of the base and of every adapter, by name.
        loose: Bounds that whoever made the bundle has loosened.
    """
    lines = [f"# Parity of {manifest.name}, version {manifest.version}", ""]
    lines += [f"A {manifest.kind} of profile {manifest.profile}, opened by the runtime and compared with {against}.", ""]
    lines += ["| | " + " | ".join(_COLUMNS) + " |", "|---" * (len(_COLUMNS) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(_row(figures)) + " |" for name, figures in of.items()]
    lines += ["", "Bounds:", ""]
    bounds = {name: limit for figures in of.values() for name, limit in figures.budgets.items()}
    for name, limit in bounds.items():
        said = "; loosened by whoever made this bundle" if name in loose else ""
        lines.append(f"- {name} {'at least' if name in AT_LEAST else 'at most'} {limit:g}: {_ABOUT[name]}{said}")
    return "\n".join(lines) + "\n"


def _row(figures: Parity) -> list[str]:
    metrics = ", ".join(f"{name} {written(before)} → {written(after)}" for name, (before, after) in figures.metrics.items())
    shares = (figures.kl, figures.top1, figures.perplexity_ratio, figures.cosine)
    largest = (figures.largest_logit_difference, figures.largest_logit)
    told = [written(value, 3) for value in largest] + ["" if value is None else written(value, 5) for value in shares]
    return [str(figures.rows), str(figures.positions), *told, metrics]


def written(value: float, digits: int = 4) -> str:
    """A number for people: that many digits, and large ones whole, for nobody reads 3e+04."""
    return f"{value:,.0f}" if abs(value) >= _LARGE else f"{value:.{digits}g}"
