"""The parity gate: what a bundle answers, held against the model that it was made from; every figure has a bound.

The two models are given as functions from token ids to what they put out, so that nothing here depends on what computes them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge.runtime.manifest import Parity
from protocol.errors import BundleError, ConfigurationError

Kind = Literal["decoder", "classifier", "embedder"]
Array = NDArray[Any]
Outputs = Callable[[Sequence[int]], Array]
IGNORED = -100
_AT_ONCE = 1 << 22  # numbers of a distribution in float64 at a time: a large vocabulary's would fill memory
_LARGEST = 700.0  # exp of more is no float64
# Where more is better, the bound is the least that there may be.
AT_LEAST = frozenset({"top1", "cosine"})
# What quantisation may cost, by profile. The difference of float32 is rounding alone: 1e-5, or that share of the largest logit
# where logits are larger than 1. What is asked of given rows (metric_loss, perplexity_ratio) is what the profiles are for. KL
# and top1 let a model of 260 000 parameters pass on texts of a kind that it never saw, where it loses most (benchmarks/LOG.md).
BUDGETS: Mapping[str, Mapping[str, float]] = {
    "fp32": {
        "difference": 1e-5,
        "kl": 1e-7,
        "top1": 0.999,
        "perplexity_ratio": 1.0001,
        "cosine": 0.99999,
        "metric_loss": 0.001,
    },
    "fp16": {"kl": 1e-3, "top1": 0.99, "perplexity_ratio": 1.002, "cosine": 0.9999, "metric_loss": 0.002},
    "q8": {"kl": 1e-2, "top1": 0.95, "perplexity_ratio": 1.01, "cosine": 0.999, "metric_loss": 0.003},
    "int8-dynamic": {"kl": 5e-2, "top1": 0.9, "perplexity_ratio": 1.03, "cosine": 0.98, "metric_loss": 0.01},
    "q4": {"kl": 0.3, "top1": 0.65, "perplexity_ratio": 1.08, "cosine": 0.94, "metric_loss": 0.015},
}


@dataclass(frozen=True)
class Probe:
    """One text that both models read.

    Attributes:
        ids: Token ids.
        wanted: Of a given row: the label of every token, -100 where there is none (decoder), or the row's label (classifier).
    """

    ids: Sequence[int]
    wanted: Sequence[int] | int | None = None


def limits_of(profile: str, changes: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
    """The bounds of a profile with a user's own in place of some, and which of these are looser.

    Raises:
        ConfigurationError: The profile has none, or a bound has no such name or is no number.
    """
    if profile not in BUDGETS:
        raise ConfigurationError("profile", [f"found {profile!r}, expected one of {', '.join(BUDGETS)}"])
    known = {**BUDGETS["fp32"], **BUDGETS[profile]}
    wrong = [f"{name}: unknown; expected one of {', '.join(known)}" for name in changes if name not in known]
    wrong += [f"{name}: found {value}, expected a finite number from 0" for name, value in changes.items() if not _sane(value)]
    if wrong:
        raise ConfigurationError("budget", wrong)
    standard = BUDGETS[profile]
    loose = [name for name, value in changes.items() if name in standard and _worse(name, value, standard[name])]
    return {**standard, **changes}, loose


def compare(kind: Kind, model: Outputs, bundle: Outputs, probes: Sequence[Probe]) -> Parity:
    """Reads every text with both; perplexity is that of the given rows' answers, or of whole texts.

    Args:
        kind: A decoder puts out ``(tokens, vocabulary)`` logits, a classifier ``(labels,)``, an embedder ``(hidden,)``.
        model: What the bundle was made from.
        bundle: Opened by the runtime.
        probes: At least one; of one kind, with ``wanted`` or without.

    Raises:
        BundleError: An output has another shape than the model's, or one or a figure of them is not finite.
    """
    if not probes:
        raise BundleError("there is no text to compare the bundle on; give rows that leave something to read")
    read = [_summands(kind, *_both(model, bundle, probe.ids), probe) for probe in probes]
    sums = {name: sum(each.get(name, 0.0) for each in read) for name in {name for each in read for name in each}}
    most = {name: max(each[name] for each in read) for name in ("difference", "largest")}
    told: dict[str, Any] = {"rows": len(read), "positions": int(sums["positions"])}
    told |= {"largest_logit_difference": most["difference"], "largest_logit": most["largest"]}
    if "product" in sums:
        cosine = min(map(_cosine, read)) if kind == "embedder" else _cosine(sums)
        return _told(told | {"cosine": cosine})
    told |= {name: sums[name] / sums["positions"] for name in ("kl", "top1")}
    metrics: dict[str, tuple[float, float]] = {}
    given = [probe.wanted for probe in probes if probe.wanted is not None]
    if any(isinstance(wanted, int) or IGNORED in wanted for wanted in given):  # nobody expects a text to be guessed whole
        metrics["accuracy"] = (sums["right"] / len(read), sums["right_in_bundle"] / len(read))
    if kind == "decoder":
        nats, ours = (sums[name] / max(sums["counted"], 1) for name in ("nats", "nats_in_bundle"))
        told["perplexity_ratio"] = math.exp(min(ours - nats, _LARGEST))
        if given:
            metrics["perplexity"] = (math.exp(min(nats, _LARGEST)), math.exp(min(ours, _LARGEST)))
    return _told(told | {"metrics": metrics})


def _told(figures: dict[str, Any]) -> Parity:
    """No comparison with a number that is none ever fails, or always does."""
    if wrong := [name for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise BundleError(f"{', '.join(wrong)} of bundle and model cannot be computed: an output is 0 everywhere")
    return Parity(**figures)


def measured(figures: Parity) -> dict[str, float]:
    """The figures that there are bounds for, by the names of these: perplexity and accuracy are of given rows alone."""
    before, after = figures.metrics.get("accuracy", (0.0, 0.0))
    found = {
        "difference": figures.largest_logit_difference / max(1.0, figures.largest_logit),
        "kl": figures.kl,
        "top1": figures.top1,
        "perplexity_ratio": figures.perplexity_ratio if "perplexity" in figures.metrics else None,
        "cosine": figures.cosine,
        "metric_loss": before - after if "accuracy" in figures.metrics else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def missed(figures: Parity) -> Iterator[str]:
    """Bounds (``budgets``) that are not kept, a line each; what is not a number keeps none."""
    found = measured(figures)
    for name, limit in figures.budgets.items():
        # One answer of few rows may turn, and one position of few.
        least = 1 / (figures.rows if name == "metric_loss" else figures.positions)
        allowed = {"metric_loss": max(limit, least), "top1": min(limit, 1 - least)}.get(name, limit)
        if name in found and (not math.isfinite(found[name]) or _worse(name, found[name], allowed)):
            bound = "at least" if name in AT_LEAST else "at most"
            yield f"{name} is {found[name]:.6g}, expected {bound} {allowed:.6g}"


def check(profile: str, of: Mapping[str, Parity]) -> None:
    """Lets a bundle pass, or says all that is wrong with it.

    Args:
        profile: It was quantised with.
        of: Figures of the base and of every adapter, by name, with the bounds that each is held to.

    Raises:
        BundleError: A bound is not kept.
    """
    wrong = [f"  - {name}: {line}" for name, figures in of.items() for line in missed(figures)]
    if wrong:
        raise BundleError(
            f"the {profile} bundle differs too much from its model, and was not written:\n" + "\n".join(wrong) + "\n"
            f"choose another --profile ({', '.join(BUDGETS)}: from the nearest to the farthest), keep sensitive layers at 8 "
            "bits (--max-bytes), or set a bound of your own with --budget NAME=VALUE, which the manifest tells"
        )


def _sane(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _worse(name: str, value: float, limit: float) -> bool:
    return value < limit if name in AT_LEAST else value > limit


def _both(model: Outputs, bundle: Outputs, ids: Sequence[int]) -> tuple[Array, Array]:
    """Both outputs as ``(positions, numbers)``."""
    expected, found = (np.asarray(each(ids)) for each in (model, bundle))
    if expected.shape != found.shape:
        raise BundleError(
            f"the bundle puts out {list(found.shape)} numbers where its model puts out {list(expected.shape)}; export it anew"
        )
    for whose, numbers in (("model", expected), ("bundle", found)):
        if wrong := int(numbers.size - np.isfinite(numbers).sum()):
            raise BundleError(f"{wrong} of {numbers.size} outputs of the {whose} are NaN or infinite; it cannot be used")
    width = expected.shape[-1]
    return expected.reshape(-1, width), found.reshape(-1, width)


def _summands(kind: Kind, expected: Array, found: Array, probe: Probe) -> dict[str, float]:
    if kind == "embedder" or (kind == "classifier" and expected.shape[1] == 1):
        return _directions(expected, found)
    return _distributions(expected, found, _labels(kind, probe, len(expected)), is_given=probe.wanted is not None)


def _directions(expected: Array, found: Array) -> dict[str, float]:
    """What one text adds to the sums where outputs are a direction, or one score."""
    wide, other = expected.astype(np.float64), found.astype(np.float64)
    told = {"positions": 1.0, "difference": float(np.abs(wide - other).max()), "largest": float(np.abs(wide).max())}
    energies = {"energy": float((wide**2).sum()), "energy_in_bundle": float((other**2).sum())}
    return told | energies | {"product": float((wide * other).sum())}


def _distributions(expected: Array, found: Array, labels: Array, *, is_given: bool) -> dict[str, float]:
    """What one text adds to the sums where outputs are logits."""
    told = dict.fromkeys(("difference", "largest", "kl", "nats", "nats_in_bundle"), 0.0)
    size = max(1, _AT_ONCE // expected.shape[1])
    for first in range(0, len(expected), size):
        part = slice(first, first + size)
        wide, other = expected[part].astype(np.float64), found[part].astype(np.float64)
        told["difference"] = max(told["difference"], float(np.abs(wide - other).max()))
        told["largest"] = max(told["largest"], float(np.abs(wide).max()))
        logs, others = _log_softmax(wide), _log_softmax(other)
        told["kl"] += float((np.exp(logs) * (logs - others)).sum())
        at = np.flatnonzero(labels[part] != IGNORED)
        told["nats"] -= float(logs[at, labels[part][at]].sum())
        told["nats_in_bundle"] -= float(others[at, labels[part][at]].sum())
    counted, guessed, ours = labels != IGNORED, expected.argmax(1), found.argmax(1)
    told |= {"positions": len(expected), "top1": float((guessed == ours).sum()), "counted": float(counted.sum())}
    if is_given:
        told["right"] = float((guessed == labels)[counted].all())
        told["right_in_bundle"] = float((ours == labels)[counted].all())
    return told


def _cosine(sums: Mapping[str, float]) -> float:
    norms = math.sqrt(sums["energy"] * sums["energy_in_bundle"])
    return sums["product"] / norms if norms else math.nan


def _labels(kind: Kind, probe: Probe, positions: int) -> Array:
    """What each position should say: the token after it, or the text's label; -100 where it does not matter."""
    labels = np.full(positions, IGNORED)
    if kind == "classifier" and isinstance(probe.wanted, int):
        labels[:] = probe.wanted
    if kind == "decoder":
        given = probe.wanted if isinstance(probe.wanted, Sequence) else probe.ids
        labels[:-1] = given[1:]
    return labels


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
