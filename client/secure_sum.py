"""A node's part in a round whose updates are only added up: its answers, its secrets between them, and what it never does.

The update stays here, in the node's Flower state, until the round's sums are over; so do the keys, which no file holds. What a
coordinator that nobody needs to trust could learn from several sums, this file bounds: a sum less the same sum without one node
is that node. So of one round a node helps to open sums over two lists of nodes at most, and those differ by as many nodes as it
wants to be hidden among. That holds for both sums of a round, for every attempt at it, and for a round that is asked for again.
Where nodes' own noise is what protects them, each keeps its own count of the sums that it has opened, and opens none beyond
what was promised.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict
from numpy.typing import NDArray

from client.memory import Memory
from client.node import Node as Settings
from protocol.adapter import Array, Factors
from protocol.enrolment import Enrolled, read_enrolled
from protocol.errors import ConfigurationError, MessageError, PrivacyError, SecureSumError
from protocol.privacy.concentrated import epsilon
from protocol.privacy.private_sum import first_vector, own_part, second_vector
from protocol.privacy.promise import Promise
from protocol.records import Received, read_ranges, read_stage, stage_records
from protocol.secure_sum.contribution import Frame, words
from protocol.secure_sum.fixed_point import Words
from protocol.secure_sum.node import Node
from protocol.secure_sum.sketch import Innovation, Sketch
from protocol.secure_sum.stages import (
    FIRST,
    Adverts,
    Asked,
    Confirm,
    Confirmation,
    Mask,
    Next,
    Open,
    Opened,
    Share,
    Shares,
    ToldAdvert,
)
from protocol.secure_sum.terms import Terms
from protocol.signature import read_private
from protocol.update import Update

_KEYS, _UPDATE, _PAST, _SPENT = "secure-sum keys", "secure-sum update", "secure-sum past", "privacy spent"
_ROUNDS, _ATTEMPTS, _LISTS = 100, 1000, 2


@dataclass(frozen=True)
class Party:
    """Who takes part, and where it keeps what.

    Attributes:
        name: As enrolled.
        identity: Its own signing key.
        enrolled: Public keys of everybody.
        fewest: How many nodes it wants to be hidden among.
        secrets: Where keys and the update wait for the next message.
        past: Where it remembers which sums it has opened; outlives the process where the node has a folder for that.
    """

    name: str
    identity: Ed25519PrivateKey
    enrolled: Enrolled
    fewest: int
    secrets: Memory
    past: Memory

    @classmethod
    def of(cls, node: Settings, state: RecordDict, federation: str) -> Self:
        """The node as its settings say.

        Raises:
            UserError: Its key, or the list of keys, is not named or cannot be read.
        """
        if node.identity is None or node.enrolled is None:
            raise ConfigurationError(
                "node config", ["identity, enrolled: needed for a secure sum; name the private key and the list of public ones"]
            )
        identity, enrolled = read_private(node.identity), read_enrolled(node.enrolled)
        past = Memory.of(node, state, federation)
        return cls(node.name, identity, enrolled, node.fewest_summed, Memory(state, federation, None), past)


def begin(received: Received, party: Party, train: Callable[[], Update]) -> RecordDict:
    """The first answer: trains, keeps the change here, and advertises fresh keys for each sum.

    Args:
        received: A call that asks for a secure sum, with its adapter.
        party: This node.
        train: Makes the update; not called under terms that this node does not take.

    Raises:
        SecureSumError: The terms would not hide this node, are those of an attempt that it has seen, or do not fit its update.
        PrivacyError: The round would cost more than was promised.
    """
    call, asked = received.call, received.call.secure_sum
    if asked is None:
        raise SecureSumError("secure sum: the call asks for none")
    if asked.call != call.alike():
        raise SecureSumError(
            "secure sum: this node is asked for something else than the others are said to be; nothing is trained"
        )
    past = _Past.read(party.past)
    past.begin(call.round, asked, party)
    _forget(party)
    if call.privacy:
        _check_spent(party.past, call.privacy, (FIRST,))  # before any work; once it is known how many sums there are, again
    update = train()
    modules = {module: pair.shape for module, pair in update.adapter.factors.items()}
    dense = {name: tensor.shape for name, tensor in update.adapter.dense.items()}
    frame = Frame(asked, modules, dense, received.adapter, call.trains, call.privacy)
    terms = frame.terms(call.federation, call.round)
    if promise := call.privacy:
        _check_spent(party.past, promise, range(len(terms)))
        part, weight = own_part(frame, promise, update.adapter, received.trained(), update.rows), 1.0
        own, vector = part.innovation, first_vector(frame.sketch(), promise, part)
    else:
        own, weight = (
            frame.innovation(update.adapter, received.trained(), update.rows),
            frame.weight(update.manifest.num_examples),
        )
        vector = frame.sketch().first(own, weight)
    first = _words(terms[FIRST], vector)
    sums = _Sums(asked.run, tuple(Node(party.name, each, party.identity, party.enrolled) for each in terms))
    adverts = Adverts(adverts=tuple(ToldAdvert.of(node.advertise()) for node in sums.nodes))
    party.secrets.keep(_UPDATE, {"first": first, "weight": np.array(weight), "width": np.array(asked.width)} | _arrays(own))
    sums.keep(party)
    past.keep(party.past)
    return stage_records(adverts)


def go_on(records: RecordDict, party_of: Callable[[str], Party]) -> RecordDict:
    """Every later answer.

    Args:
        records: The coordinator's next question.
        party_of: This node, in a federation of that name.

    Raises:
        MessageError: It is no question of a stage.
        SecureSumError: It is out of order, of another attempt, or would reveal too much; nothing is sent.
    """
    question = read_stage(records, Next).question
    party = party_of(question.federation)
    sums = _Sums.read(party, question.run)
    phase = FIRST if isinstance(question, Share) else question.phase
    if phase >= len(sums.nodes):
        raise MessageError(f"phase: found {phase}, and there is one sum only")
    if isinstance(question, Share):
        answer = _share(question, sums)
    elif isinstance(question, Mask):
        answer = _mask(records, question, sums.nodes[phase], party)
    elif isinstance(question, Confirm):
        answer = _confirm(question, sums, party)
    else:
        answer = _open(question, sums, party)
    if isinstance(question, Open) and phase == len(sums.nodes) - 1:
        _forget(party)
    else:
        sums.keep(party)
    return answer


def _share(question: Share, sums: "_Sums") -> RecordDict:
    if len(question.adverts) != len(sums.nodes):
        raise MessageError(f"adverts: found those of {len(question.adverts)} sums, expected {len(sums.nodes)}")
    sealed = tuple(
        node.share({name: told.advert() for name, told in adverts.items()})
        for node, adverts in zip(sums.nodes, question.adverts, strict=True)
    )
    return stage_records(Shares(sealed=sealed))


def _mask(records: RecordDict, question: Mask, node: Node, party: Party) -> RecordDict:
    kept = party.secrets.read(_UPDATE)
    if question.phase == FIRST:
        values, told = kept["first"], b""
    else:
        modules = _innovation(kept)
        shapes = {module: terms[0][1].shape for module, terms in modules.items()}
        sketch = Sketch(shapes, {}, frozenset(), int(kept["width"]), b"")
        own, ranges, promise = Innovation(modules), read_ranges(records), _promise(node.terms)
        vector = second_vector(sketch, promise, own, ranges) if promise else sketch.second(own, ranges, float(kept["weight"]))
        values, told = _words(node.terms, vector), Sketch.digest(ranges)
    return stage_records(None, vector=node.mask(question.shares, values.copy(), told))


def _words(terms: Terms, vector: NDArray[np.float64]) -> Words:
    """A vector in fixed point, with this node's noise where it was promised: before it is kept, masked or sent."""
    found = words(terms, vector)
    if promise := _promise(terms):
        promise.add_noise(terms, found)
    return found


def _check_spent(past: Memory, promise: Promise, phases: Iterable[int]) -> None:
    """Holds a coordinator to its promise where nodes make it true: every sum that is opened is another release.

    Raises:
        PrivacyError: The sums of this round, with those that were opened before, cost more than all rounds together were to.
    """
    if promise.noise != "nodes":
        return
    total = _spent(past) + sum(map(promise.cost, phases))
    found = epsilon(total, promise.delta)
    if found > promise.epsilon * (1 + 1e-9):
        raise PrivacyError(
            f"privacy: this round would bring what this node has spent in this federation to an epsilon of {found:.4g}, and "
            f"{promise.epsilon:g} was promised for all rounds together; nothing is sent"
        )


def _spent(past: Memory) -> float:
    return float(past.read(_SPENT).get("rho", np.zeros(())))


def _promise(terms: Terms) -> Promise | None:
    return Promise.model_validate_json(terms.promise) if terms.promise else None


def _confirm(question: Confirm, sums: "_Sums", party: Party) -> RecordDict:
    survivors, node = frozenset(question.survivors), sums.nodes[question.phase]
    if len(survivors) < party.fewest:
        raise SecureSumError(
            f"secure sum: {len(survivors)} nodes have stayed, this one wants {party.fewest}; nothing is opened"
        )
    _Past.read(party.past).compare(node.terms.round, survivors, sums.confirmed(), party.fewest)
    return stage_records(Confirmation(signature=node.confirm(survivors)))


def _open(question: Open, sums: "_Sums", party: Party) -> RecordDict:
    node = sums.nodes[question.phase]
    opening = node.open(question.confirmations)
    past = _Past.read(party.past)
    past.opened(node.terms.round, node.survivors)
    past.keep(party.past)  # before anything leaves
    if promise := _promise(node.terms):
        party.past.keep(_SPENT, {"rho": np.array(_spent(party.past) + promise.cost(node.terms.phase))})
    return stage_records(Opened(seeds=dict(opening.seeds), keys=dict(opening.keys)))


# What is kept between messages ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sums:
    """One attempt at a round: this node in each of its sums."""

    run: str
    nodes: tuple[Node, ...]

    @classmethod
    def read(cls, party: Party, run: str) -> Self:
        kept = party.secrets.read(_KEYS)
        told = json.loads(kept["json"].tobytes()) if kept else {}
        if told.get("run") != run:
            raise SecureSumError("secure sum: asked to go on with a sum that this node has not begun, or that is over")
        terms = [Terms(**each | {"nodes": tuple(each["nodes"])}) for each in told["terms"]]
        nodes = (
            Node.restored(party.name, each, party.identity, party.enrolled, state.encode())
            for each, state in zip(terms, told["states"], strict=True)
        )
        return cls(run, tuple(nodes))

    def confirmed(self) -> list[frozenset[str]]:
        return [node.survivors for node in self.nodes if node.survivors]

    def keep(self, party: Party) -> None:
        told = {
            "run": self.run,
            "terms": [asdict(node.terms) for node in self.nodes],
            "states": [node.state().decode() for node in self.nodes],
        }
        party.secrets.keep(_KEYS, {"json": _bytes(told)})


class _Past:
    """Which attempts a node has taken part in and which sums it has opened, for the last rounds."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        self._rounds: dict[int, dict[str, list[Any]]] = {int(number): about for number, about in told.items()}

    @classmethod
    def read(cls, memory: Memory) -> Self:
        kept = memory.read(_PAST)
        return cls(json.loads(kept["json"].tobytes()) if kept else {})

    def keep(self, memory: Memory) -> None:
        newest = sorted(self._rounds)[-_ROUNDS:]
        memory.keep(_PAST, {"json": _bytes({str(number): self._rounds[number] for number in newest})})

    def begin(self, number: int, asked: Asked, party: Party) -> None:
        """Looks at the terms of an attempt and remembers it."""
        if len(set(asked.nodes)) < max(party.fewest, len(asked.nodes)):
            raise SecureSumError(
                f"secure sum: asked of {len(set(asked.nodes))} nodes, this one wants {party.fewest}, each named once; nothing "
                "is trained"
            )
        if len(self._rounds) >= _ROUNDS and number < min(self._rounds):
            raise SecureSumError(f"secure sum: round {number} is long over; nothing is trained")
        if party.name not in asked.nodes or set(asked.nodes) - party.enrolled.keys():
            raise SecureSumError("secure sum: this node is not among those who are asked, or others are not enrolled here")
        about = self._rounds.setdefault(number, {"runs": [], "opened": []})
        if asked.run in about["runs"] or len(about["runs"]) >= _ATTEMPTS:
            raise SecureSumError("secure sum: an attempt that this node has seen already; nothing is trained")
        about["runs"].append(asked.run)

    def compare(self, number: int, survivors: frozenset[str], others: Iterable[frozenset[str]], fewest: int) -> None:
        """Makes sure that a sum over some nodes, beside those of this round that were opened, gives nobody away."""
        known = {frozenset(each) for each in self._rounds.get(number, {}).get("opened", [])} | set(others)
        apart = min((len(survivors ^ other) for other in known if other != survivors), default=fewest)
        if len(known | {survivors}) > _LISTS or apart < fewest:
            raise SecureSumError(
                f"secure sum: {apart} nodes more or less than in another sum of round {number}, this node wants {fewest}, and "
                f"{_LISTS} lists at most: the difference would give them away; nothing is opened"
            )

    def opened(self, number: int, survivors: frozenset[str]) -> None:
        lists = self._rounds.setdefault(number, {"runs": [], "opened": []})["opened"]
        if sorted(survivors) not in lists:
            lists.append(sorted(survivors))


def _forget(party: Party) -> None:
    for name in (_KEYS, _UPDATE):
        party.secrets.forget(name)


def _bytes(told: Mapping[str, Any]) -> Array:
    return np.frombuffer(json.dumps(told).encode(), np.uint8)


def _arrays(own: Innovation) -> dict[str, Array]:
    """What the second sum needs; a module that has not changed is kept as a pair of rank 0."""
    found: dict[str, Array] = {}
    for module, terms in own.modules.items():
        for _, pair in terms:
            found |= {f"A|{module}": pair.A, f"B|{module}": pair.B}
    return found


def _innovation(kept: Mapping[str, Array]) -> dict[str, list[tuple[float, Factors]]]:
    modules = [name[2:] for name in kept if name.startswith("A|")]
    return {module: [(1.0, Factors(kept[f"A|{module}"], kept[f"B|{module}"]))] for module in modules}
