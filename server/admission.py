"""Accept one reply, or say why not. Nothing that a node sends may end a round.

A reply is held against what its node offered and was asked: here, alone; then against the cohort (``server.standing``). That
it is this node's one answer to this question of this run is known from Flower's message ids (``server.exchange``).
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np

from protocol.adapter import Adapter, Array, Factors
from protocol.errors import MessageError
from protocol.formats import understood, written
from protocol.plan import Method, Plan, Precision, alike
from protocol.product_space import stack
from protocol.records import Call, Offer
from protocol.update import Update

# Far above what training makes (16384 x 16384 entries of 0.02 have the norm 330) and below where fp16 ends (65504), so that
# what is merged can be sent again. A bound for outliers is learnt from the cohort; this one is against overflow.
LARGEST = 1e4
# Where the plan counts epochs only the node knows its rows. 16 million are weeks on one accelerator; the sum over half a
# billion such nodes is still a count that a manifest holds. What a claim within this weighs, the cohort decides.
MOST_EXAMPLES = 2**24
# A tensor mostly of numbers below these is no training's result: some hardware flushes them to zero, some takes long over each.
# A factor in fp16 is widened before anything is done with it, and then its smallest are ordinary.
_SMALLEST = {"float32": float(np.finfo(np.float32).tiny), "float64": float(np.finfo(np.float64).tiny)}
# Rounding of a tensor that was received, put into a model and sent back, as a share of its largest entry. fp32 is not exact:
# B is divided by the scaling and multiplied again. Coded formats send the difference, and err by a share of that.
_ROUNDING, _ROUNDING_FP16 = 2**-20, 2**-10
# At the end of a round an adapter is in memory four times at least: as it was sent, a node's, what it becomes, what is written.
_COPIES = 4
# On the wire a tensor has a header, a name and a shape beside its numbers.
_BESIDE_A_TENSOR = 4096
# PEFT reads the names of modules as regular expressions, and those of tensors as paths.
_NAME = re.compile(r"[^\s.^$*+?{}\[\]\\|()]+(\.[^\s.^$*+?{}\[\]\\|()]+)*")
_RESERVED = "__metadata__"  # by safetensors


class Change(NamedTuple):
    """How far an update is from what it began from.

    Attributes:
        norm: Frobenius norm of the whole change.
        apart: Norm that the factors' products would have if no two directions shared anything: the root of the sum of their
            squared sizes ``|s b_i| |a_i|``. Where it is far above the norm, directions cancel: then what is left of them is
            their rounding, in every sum that they go into.
    """

    norm: float
    apart: float


def check(update: Update, offer: Offer, call: Call, start: Adapter) -> Change:
    """Holds an update against what its node offered and was asked.

    Dtypes and tensor keys were checked when it was read (``protocol.records``).

    Args:
        update: As it was read.
        offer: Of the node.
        call: What the node was asked.
        start: What the node's change is counted from (``Start.trained``): factors ``(r, d_in)`` and ``(d_out, r)``.

    Returns:
        The change: of ``B A - start`` over all modules (of ``A - start`` where B stays at its node) and of the trained rows of
        dense tensors. A tensor that nobody sent counts from zero.

    Raises:
        MessageError: The first thing that does not fit: which tensor, what was found, what was expected.
    """
    _check_manifest(update, offer, call)
    _check_names("module", update.adapter.factors.keys(), offer.modules.keys())
    _check_names("tensor", update.adapter.dense.keys(), offer.dense.keys())
    _check_shapes(update, offer, call)
    _check_rows(update, offer)
    _check_numbers(update.adapter)
    _check_frozen(update, call, start)
    return _change(update, call, start)


def most_bytes(offer: Offer, call: Call) -> int:
    """Bytes that an update may take in memory as it arrives: every number whole, at the rank that was asked."""
    numbers = _numbers(offer, call.r) + sum(shape[0] for shape in offer.dense.values() if shape)
    return 4 * numbers + _BESIDE_A_TENSOR * (2 * (len(offer.modules) + len(offer.dense)) + 4)


def check_offer(offer: Offer, reference: Offer, method: Method) -> None:
    """Holds a node's offer against the federation's: its method, same base, same modules and tensors of the same shapes.

    Raises:
        MessageError: The first thing that does not fit.
    """
    if not (offer.name.isprintable() and offer.name.strip()):  # it is shown on terminals and in logs
        raise MessageError(f"name: found {offer.name!r}, expected text that can be printed")
    if offer.method not in alike(method):
        raise MessageError(f"method: found {offer.method}, expected {' or '.join(alike(method))}")
    if offer.base_digest != reference.base_digest:
        raise MessageError(
            f"base: found {offer.base_digest[:12]}, expected {reference.base_digest[:12]}; the node holds another base model"
        )
    if offer.modules != reference.modules:
        raise MessageError(f"modules: {_difference(offer.modules, reference.modules)}")
    if offer.embeddings != reference.embeddings:
        raise MessageError(
            f"embeddings: found {len(offer.embeddings)}, expected {len(reference.embeddings)} modules that look up their weight"
        )
    if offer.dense != reference.dense:
        raise MessageError(f"tensors: {_difference(offer.dense, reference.dense)}")


def check_size(offer: Offer, memory: int) -> None:
    """Holds an offer to what this machine can merge.

    Args:
        offer: Of any node.
        memory: Bytes of this machine's.

    Raises:
        MessageError: An adapter of that shape and rank is too large.
    """
    found, most = 4 * _numbers(offer, offer.r), memory // _COPIES
    if found > most:
        raise MessageError(
            f"size: found an adapter of {found / 1e9:.3g} GB at rank {offer.r}, expected at most {most / 1e9:.3g} GB, of which "
            f"this coordinator's memory holds {_COPIES}"
        )


def check_shape(offer: Offer, plan: Plan) -> None:
    """Holds an offer that others will be held against to what can be written and read again.

    Args:
        offer: Of the first node of an adapter. Dimensions and names are within bounds already (``protocol.records``).
        plan: The adapter's; its method says how an adapter is written.

    Raises:
        MessageError: What does not fit.
    """
    for name in (*offer.modules, *offer.dense):
        if not (name.isprintable() and _NAME.fullmatch(name)) or name == _RESERVED:
            raise MessageError(
                f"name of a tensor: found {name!r}, expected a path of words without blanks and ()[]{{}}\\^$.|*+?"
            )
    if strange := set(offer.embeddings) - offer.modules.keys():
        raise MessageError(f"embeddings: found {min(strange)!r}, expected modules of the offer")
    _check_written(offer, plan)


def memory_bytes() -> int:
    """Of this machine, or of the container that it is; where neither says, of the largest that there are."""
    try:
        own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        own = 2**44
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        limit = ""
    return min(own, int(limit)) if limit.isdigit() else own


def most_examples(call: Call) -> int:
    """Rows that a node can have trained on in a round: exact where the plan counts steps."""
    settings = call.plan.training
    if settings.max_steps is None:
        return MOST_EXAMPLES
    return min(settings.max_steps * settings.batch_size * settings.gradient_accumulation_steps, MOST_EXAMPLES)


def _check_manifest(update: Update, offer: Offer, call: Call) -> None:
    manifest = update.manifest
    expected = {
        "kind": (manifest.kind, "update"),
        "adapter": (offer.adapter, call.adapter),
        "federation": (manifest.federation, call.federation),
        "round": (manifest.round, call.round),
        "base": (manifest.base_digest, offer.base_digest),
        "parent": (manifest.parent, call.digest),
    }
    for what, (found, wanted) in expected.items():
        if found != wanted:
            raise MessageError(f"{what}: found {str(found)[:80]!r}, expected {str(wanted)[:80]!r}")
    if manifest.embeddings not in ((), offer.embeddings):
        raise MessageError(f"embeddings: found {len(manifest.embeddings)} other modules than those of the offer, expected none")
    most = most_examples(call)
    if not 1 <= manifest.num_examples <= most:
        raise MessageError(f"num-examples: found {manifest.num_examples}, expected 1 to {most}")
    for what, told, known in (
        # A node that runs out of memory may go on with a base of fewer bits, and with what goes with it.
        ("method", manifest.method, alike(offer.method)),
        ("precision", manifest.precision, get_args(Precision)),
    ):
        if told not in known:
            raise MessageError(f"{what}: found {told[:80]!r}, expected one of {', '.join(known)}")


def _check_names(kind: str, found: Set[str], wanted: Set[str]) -> None:
    extra, missing = found - wanted, wanted - found
    if extra or missing:
        some = ", ".join(repr(name[:80]) for name in sorted([*extra, *missing])[:3])
        raise MessageError(f"{kind}s: found {len(extra)} unknown and {len(missing)} missing (such as {some})")


def _check_shapes(update: Update, offer: Offer, call: Call) -> None:
    for module, pair in update.adapter.factors.items():
        if pair.shape != offer.modules[module]:
            raise MessageError(f"{module}: found shape {pair.shape}, expected {offer.modules[module]}")
        if not 1 <= pair.r <= call.r:
            raise MessageError(f"{module}: found rank {pair.r}, expected 1 to the {call.r} that was asked")
    largest = max(update.adapter.ranks().values(), default=0)
    if update.manifest.r != largest:
        raise MessageError(f"r: found {update.manifest.r}, expected {largest}, the largest rank of the factors beside it")
    for name, tensor in update.adapter.dense.items():
        if tensor.shape != offer.dense[name]:
            raise MessageError(f"{name}: found shape {tensor.shape}, expected {offer.dense[name]}")


def _check_rows(update: Update, offer: Offer) -> None:
    for name, mask in update.rows.items():
        if name not in offer.dense or mask.shape != offer.dense[name][:1]:
            raise MessageError(f"rows of {name[:80]!r}: found shape {mask.shape}, expected {offer.dense.get(name, ())[:1]}")
        if mask.dtype != np.bool_:
            raise MessageError(f"rows of {name!r}: found dtype {mask.dtype}, expected bool")
        if not np.any(mask):
            raise MessageError(f"rows of {name!r}: no row was trained, expected at least one")


def _check_numbers(adapter: Adapter) -> None:
    """Every entry is finite and can be squared, summed and sent again in any format."""
    for name, tensor in _tensors(adapter):
        largest = float(np.max(np.abs(tensor), initial=0.0))
        if not largest <= LARGEST:  # NaN is not either
            raise MessageError(f"{name}: found a value of size {largest:.3g}, expected at most {LARGEST:g}")
        smallest = _SMALLEST.get(tensor.dtype.name, 0.0)
        if smallest and 2 * np.count_nonzero((tensor != 0) & (np.abs(tensor) < smallest)) > tensor.size:
            raise MessageError(
                f"{name}: found more than half of its values subnormal, expected values of at least {smallest:.2g}"
            )


def _tensors(adapter: Adapter) -> Iterator[tuple[str, Array]]:
    for module, pair in adapter.factors.items():
        yield f"A of {module}", pair.A
        yield f"B of {module}", pair.B
    yield from adapter.dense.items()


def _check_frozen(update: Update, call: Call, start: Adapter) -> None:
    """A factor that was not to be trained is the one that was sent, to the rounding of the wire."""
    if call.trains == "both" and not call.personal_b:
        return
    frozen = "A" if call.trains == "B" else "B"
    rounding = _ROUNDING_FP16 if call.wire == "fp16" else _ROUNDING
    for module, pair in update.adapter.factors.items():
        if module not in start.factors:
            continue
        found, wanted = _rows_of(pair, frozen), _rows_of(start.factors[module], frozen)
        if len(found) > len(wanted):
            raise MessageError(
                f"{frozen} of {module}: found {len(found)} directions, expected the {len(wanted)} that were sent"
            )
        away = float(np.max(np.abs(found - wanted[: len(found)]), initial=0.0))
        if away > rounding * np.max(np.abs(wanted), initial=0.0):
            raise MessageError(f"{frozen} of {module}: found a change of {away:.3g}, expected none: this factor is frozen")


def _rows_of(pair: Factors, factor: str) -> Array:
    """``(r, d_in)`` of A, or ``(r, d_out)`` of B with the scaling inside: a row for each direction, float64."""
    return pair.A.astype(np.float64) if factor == "A" else pair.scaling * pair.B.T.astype(np.float64)


def _change(update: Update, call: Call, start: Adapter) -> Change:
    total = apart = 0.0
    for module, pair in update.adapter.factors.items():
        began = start.factors.get(module)
        size, own, change = _squared_sizes(pair, began)
        if max(size, own) > LARGEST**2:
            raise MessageError(
                f"{module}: found norm {math.sqrt(size):.3g}, and {math.sqrt(own):.3g} where directions do not cancel, "
                f"expected at most {LARGEST:g}; the training has diverged"
            )
        apart += own
        total += _squared_step(pair, began) if call.personal_b else change
    for name, tensor in update.adapter.dense.items():
        moved = tensor.astype(np.float64)
        if name in start.dense:
            moved -= start.dense[name]
            moved = moved[update.rows[name]] if name in update.rows else moved
        total += float(np.sum(moved**2))
    return Change(math.sqrt(total), math.sqrt(apart))


def _squared_step(pair: Factors, began: Factors | None) -> float:
    """Of A's change, over the directions that the node sent: the others are averaged without it."""
    step = pair.A.astype(np.float64)
    if began is not None:
        shared = min(pair.r, began.r)
        step[:shared] -= began.A[:shared]
    return float(np.sum(step**2))


def _squared_sizes(pair: Factors, began: Factors | None) -> tuple[float, float, float]:
    """Squared norm of ``s B A``, of its directions apart, and of its difference to the start, from one Gram matrix.

    What is less than float32's rounding of the directions, in which they travelled, is no difference. Above that the Gram's own
    rounding, 1e-16 of their squares, is a hundredth of it at most.
    """
    left, right = stack([(1.0, pair)] if began is None else [(1.0, pair), (-1.0, began)])
    gram = (left.T @ left) * (right @ right.T)
    own = pair.r if pair.scaling else 0  # terms without weight are not in the stack
    change, rounding = float(gram.sum()), float(np.finfo(np.float32).eps) ** 2 * float(np.trace(gram))
    own_gram = gram[:own, :own]
    return max(float(own_gram.sum()), 0.0), float(np.trace(own_gram)), change if change > rounding else 0.0


def _numbers(offer: Offer, r: int) -> int:
    """Of an adapter of rank ``r``."""
    factors = sum(r * (d_out + d_in) for d_out, d_in in offer.modules.values())
    return factors + sum(math.prod(shape) for shape in offer.dense.values())


def _check_written(offer: Offer, plan: Plan) -> None:
    """An adapter of such names comes back as it was from the files in which every round is kept."""
    zero = np.zeros((), np.float32)  # views of it, which take no memory
    factors = {
        m: Factors(np.broadcast_to(zero, (1, d_in)), np.broadcast_to(zero, (d_out, 1)))
        for m, (d_out, d_in) in offer.modules.items()
    }
    adapter = Adapter(factors, {name: np.broadcast_to(zero, shape) for name, shape in offer.dense.items()})
    try:
        found = understood(*written(adapter, plan, offer.embeddings), Path("adapter")).adapter
    except Exception as error:  # noqa: BLE001 - names from outside, which our own files must bear
        raise MessageError(f"names: an adapter of them cannot be kept ({type(error).__name__}: {error})") from None
    _check_names("kept module", found.factors.keys(), offer.modules.keys())
    _check_names("kept tensor", found.dense.keys(), offer.dense.keys())


def _difference(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    first = names[0]
    return f"{len(names)} differ, the first is {first[:80]!r}: found {found.get(first)}, expected {wanted.get(first)}"
