"""Error feedback: what a coded update could not say is remembered and said with the next one.

Seide et al. 2014 (1-bit SGD) and Karimireddy et al. 2019, arXiv:1901.09847, algorithm 2: with ``p_t`` what a node means and
``e_t`` what it still owes,

    sent_t = Q(p_t + e_t),     e_{t+1} = p_t + e_t - sent_t

so that the sum of what was sent is the sum of what was meant, up to the last error. For factor pairs ``p``, ``e`` and ``sent``
are products ``B A``: between rounds the coordinator factors its sum anew, and an error of A or B would mean something else
beside the new ones. The debt is itself a factor pair, of at most twice the rank that the node trains. Before it is coded, one
alternating step of least squares folds it into the pair that was trained, next to which it is small:

    B' = B + E A^T (A A^T)^-1,     A' = A + (B'^T B')^-1 B'^T (E - (B' - B) A)

What no pair of this rank can hold stays owed. The pair keeps its gauge, so its difference to the start stays small too.

Formal limits: a debt of more than ``MOST_OWED`` times the round's own change is shortened to that. Nodes start each round from
what the coordinator really has, so training itself repairs a part of what was not said; paying all of a large debt on top
overshoots, and can diverge where rounds are long (benchmarks/LOG.md).
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from client.memory import Memory
from protocol.adapter import Adapter, Array, Factors
from protocol.codec import CODED, WireFormat, encode, pack, unpack
from protocol.product_space import compress, inner
from protocol.records import Received, Trains
from protocol.update import Update

MOST_OWED = 2.0
# Least squares with a ridge of this share of a direction's mean square, so that one hardly used is not blown up.
_RIDGE = 1e-2
_ROUND = "round"


def with_feedback(update: Update, received: Received, memory: Memory) -> Update:
    """The update with what earlier ones owe; the memory then holds what this one will owe.

    Nothing happens where the wire is not coded. Asked for the same round again, it starts from the same debt again; asked for
    an earlier round than its last, from none.
    """
    call = received.call
    if call.wire not in CODED:
        return update
    name = f"owed {call.adapter}"
    known = memory.read(name)
    last = int(known[_ROUND]) if known else 0
    owed = _adapter(known, "after" if last < call.round else "before") if last <= call.round else Adapter()
    adapter, reference, trains = update.adapter, received.trained(), call.trains
    if call.personal_b:  # B is not there: A alone means something, and is the product with a B of ones on its diagonal
        adapter, reference, trains = _of_a(adapter), _of_a(reference), "A"
    meant, left = correct(adapter, reference, call.wire, owed, rows=update.rows, trains=trains)
    memory.keep(name, {_ROUND: np.array(call.round), **_arrays(owed, "before"), **_arrays(left, "after")})
    if call.personal_b:
        factors = {module: Factors(pair.A, update.adapter.factors[module].B) for module, pair in meant.factors.items()}
        meant = Adapter(factors, meant.dense)
    return replace(update, adapter=meant)


def correct(
    adapter: Adapter,
    reference: Adapter,
    wire: WireFormat,
    owed: Adapter,
    *,
    rows: Mapping[str, Array] | None = None,
    trains: Trains = "both",
) -> tuple[Adapter, Adapter]:
    """One step of error feedback.

    Args:
        adapter: As trained.
        reference: What it is coded as a difference to.
        wire: A coded format.
        owed: From the step before; empty at first.
        rows: By dense tensor, the rows that this node trained; nobody looks at the others.
        trains: The factor that may change.

    Returns:
        The adapter to send (float32, scaling 1), and what is owed after it.

    Raises:
        AdapterError: As ``protocol.codec.pack``.
    """
    trained = encode(adapter, "fp32")
    due = Adapter(
        {module: _due(owed, pair, reference, module) for module, pair in trained.factors.items()},
        {name: _due_dense(owed, tensor, reference, name) for name, tensor in trained.dense.items()},
    )
    asked = {name: _asked((rows or {}).get(name), tensor) for name, tensor in trained.dense.items()}
    meant = Adapter(
        {module: _folded(pair, due.factors[module], trains) for module, pair in trained.factors.items()},
        {name: tensor + np.where(asked[name], due.dense[name], np.float32(0)) for name, tensor in trained.dense.items()},
    )
    sent = encode(meant, wire, reference)
    left = Adapter(
        {module: _left(pair, due.factors[module], sent.factors[module]) for module, pair in trained.factors.items()},
        {name: np.where(asked[name], tensor - sent.dense[name], due.dense[name]) for name, tensor in meant.dense.items()},
    )
    return meant, left


def _folded(pair: Factors, due: Factors, trains: Trains) -> Factors:
    """The pair of the same rank and gauge that is near to the sum: one step of alternating least squares."""
    if not due.r:
        return pair
    a, b = pair.A.astype(np.float64), pair.B.astype(np.float64)
    to_b = np.zeros_like(b)
    if trains != "A":
        to_b = _solved(a @ a.T, (a @ due.A.T) @ due.B.T).T
    b = b + to_b
    if trains != "B":
        a = a + _solved(b.T @ b, (b.T @ due.B) @ due.A - (b.T @ to_b) @ a)
    return Factors(a.astype(np.float32), b.astype(np.float32))


def _solved(gram: Array, right: Array) -> Array:
    ridge = _RIDGE * float(np.trace(gram)) / max(len(gram), 1)
    solved: Array = np.linalg.solve(gram + (ridge or 1.0) * np.eye(len(gram)), right)
    return solved


def _left(pair: Factors, due: Factors, sent: Factors) -> Factors:
    rest = compress([(1.0, pair), (1.0, due), (-1.0, sent)], pair.shape, 2 * pair.r).factors
    return Factors(rest.A.astype(np.float32), rest.B.astype(np.float32))


def _due(owed: Adapter, pair: Factors, reference: Adapter, module: str) -> Factors:
    """What is owed, at most ``MOST_OWED`` times as long as the round's own change."""
    debt = owed.factors.get(module)
    if debt is None or debt.shape != pair.shape:
        return Factors(pair.A[:0], pair.B[:, :0])
    change = [(1.0, pair)] + [(-1.0, held) for held in [reference.factors.get(module)] if held]
    owes = [(1.0, debt)]
    share = _share(inner(owes, owes), inner(change, change))
    return Factors(debt.A, debt.B * np.float32(share))


def _due_dense(owed: Adapter, tensor: Array, reference: Adapter, name: str) -> Array:
    debt = owed.dense.get(name)
    if debt is None or debt.shape != tensor.shape:
        return np.zeros_like(tensor)
    change = tensor - reference.dense.get(name, np.zeros_like(tensor))
    due: Array = debt * np.float32(_share(float(np.sum(debt**2)), float(np.sum(change**2))))
    return due


def _share(debt: float, change: float) -> float:
    """The part of a debt that may be paid, from the squared norms of the two."""
    most = MOST_OWED * max(change, 0.0) ** 0.5
    return min(1.0, most / debt**0.5) if debt > 0 else 1.0


def _asked(rows: Array | None, tensor: Array) -> Array:
    mask: Array = np.ones(tensor.shape[:1], bool) if rows is None else rows
    return mask.reshape(mask.shape + (1,) * (tensor.ndim - mask.ndim))


def _of_a(adapter: Adapter) -> Adapter:
    factors = {m: Factors(pair.A, np.eye(*pair.B.shape, dtype=np.float32)) for m, pair in adapter.factors.items()}
    return Adapter(factors, adapter.dense)


def _arrays(adapter: Adapter, when: str) -> dict[str, Array]:
    return {f"{when} {key}": tensor for key, tensor in pack(adapter, "fp32").items()}


def _adapter(arrays: Mapping[str, Array], when: str) -> Adapter:
    return unpack({key.removeprefix(f"{when} "): array for key, array in arrays.items() if key.startswith(f"{when} ")})
