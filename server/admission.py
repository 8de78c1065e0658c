"""Accept one reply, or say why not. Nothing that a node sends may end a round."""

from collections.abc import Mapping, Set

import numpy as np

from protocol.errors import MessageError
from protocol.product_space import squared_norm
from protocol.records import Call, Offer
from protocol.update import Update

# Far above what training makes (16384 x 16384 entries of 0.02 have the norm 330) and below where fp16 ends (65504), so that
# what is merged can be sent again. A bound for outliers must be learnt from the cohort; this one is against overflow.
LARGEST = 1e4
# More rows than a node trains on in a round, and the sum over two million nodes is still a count that a manifest holds.
MOST_EXAMPLES = 2**32


def check(update: Update, offer: Offer, call: Call) -> None:
    """Holds an update against what its node offered and was asked.

    Finite values and tensor types were checked when it was read (``protocol.records``).

    Raises:
        MessageError: The first thing that does not fit: which tensor, what was found, what was expected.
    """
    manifest = update.manifest
    expected = {
        "kind": (manifest.kind, "update"),
        "federation": (manifest.federation, call.federation),
        "round": (manifest.round, call.round),
        "base": (manifest.base_digest, offer.base_digest),
        "parent": (manifest.parent, call.digest),
    }
    for what, (found, wanted) in expected.items():
        if found != wanted:
            raise MessageError(f"{what}: found {str(found)[:80]!r}, expected {str(wanted)[:80]!r}")
    if not 1 <= manifest.num_examples <= MOST_EXAMPLES:
        raise MessageError(f"num-examples: found {manifest.num_examples}, expected 1 to {MOST_EXAMPLES}")
    _check_names("module", update.adapter.factors.keys(), offer.modules.keys())
    _check_names("tensor", update.adapter.dense.keys(), offer.dense.keys())
    _check_shapes(update, offer)
    _check_sizes(update)


def check_offer(offer: Offer, reference: Offer) -> None:
    """Holds a node's offer against the federation's: same base, same modules and tensors of the same shapes.

    Raises:
        MessageError: The first thing that does not fit.
    """
    if offer.base_digest != reference.base_digest:
        raise MessageError(
            f"base: found {offer.base_digest[:12]}, expected {reference.base_digest[:12]}; the node holds another base model"
        )
    if offer.modules != reference.modules:
        raise MessageError(f"modules: {_difference(offer.modules, reference.modules)}")
    if offer.dense != reference.dense:
        raise MessageError(f"tensors: {_difference(offer.dense, reference.dense)}")


def _check_names(kind: str, found: Set[str], wanted: Set[str]) -> None:
    extra, missing = found - wanted, wanted - found
    if extra or missing:
        some = ", ".join(sorted(name[:80] for name in [*extra, *missing])[:3])
        raise MessageError(f"{kind}s: {len(missing)} missing and {len(extra)} unknown (such as {some})")


def _check_shapes(update: Update, offer: Offer) -> None:
    for module, pair in update.adapter.factors.items():
        if pair.shape != offer.modules[module]:
            raise MessageError(f"{module}: found shape {pair.shape}, expected {offer.modules[module]}")
        if pair.r > offer.r:
            raise MessageError(f"{module}: found rank {pair.r}, expected at most the {offer.r} that the node offered")
    for name, tensor in update.adapter.dense.items():
        if tensor.shape != offer.dense[name]:
            raise MessageError(f"{name}: found shape {tensor.shape}, expected {offer.dense[name]}")
    for name, mask in update.rows.items():
        if name not in offer.dense or mask.shape != offer.dense[name][:1]:
            raise MessageError(f"rows of {name[:80]}: found shape {mask.shape}, expected {offer.dense.get(name, ())[:1]}")
        if not np.any(mask):
            raise MessageError(f"rows of {name[:80]}: no row was trained")


def _check_sizes(update: Update) -> None:
    sizes = {module: squared_norm(pair) ** 0.5 for module, pair in update.adapter.factors.items()}
    sizes |= {name: float(np.max(np.abs(tensor), initial=0.0)) for name, tensor in update.adapter.dense.items()}
    for name, size in sizes.items():
        if not size <= LARGEST:
            raise MessageError(f"{name}: found size {size:.3g}, expected at most {LARGEST:g}; the training has diverged")


def _difference(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    first = names[0]
    return f"{len(names)} differ, the first is {first[:80]}: found {found.get(first)}, expected {wanted.get(first)}"
