"""Secure sum: what comes out is the plain sum of the words, to the bit, or nothing."""

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import SecureSumError
from protocol.secure_sum.coordinator import Coordinator
from protocol.secure_sum.messages import Opening
from protocol.secure_sum.node import ADVERT, Node
from protocol.secure_sum.terms import Terms
from protocol.signature import sign

STAGES = ("advertise", "share", "mask", "confirm", "open")
KEYS = {f"node-{number:02d}": Ed25519PrivateKey.generate() for number in range(40)}
ENROLLED = {name: key.public_key() for name, key in KEYS.items()}
BASIS = b"what all were told after they had shared"


@dataclass
class Sum:
    """A sum in which each node falls silent before one stage, or never."""

    terms: Terms
    silent: Mapping[str, str] = field(default_factory=dict)

    def stays(self, name: str, stage: str) -> bool:
        return name not in self.silent or STAGES.index(stage) < STAGES.index(self.silent[name])

    def run(self, words: Mapping[str, np.ndarray]) -> np.ndarray:
        self.masked: dict[str, np.ndarray] = {}
        coordinator = self.coordinator = Coordinator(self.terms, ENROLLED)
        nodes = self.nodes = {name: Node(name, self.terms, KEYS[name], ENROLLED) for name in self.terms.nodes}
        adverts = coordinator.advertised({n: node.advertise() for n, node in nodes.items() if self.stays(n, "advertise")})
        boxes = coordinator.routed({n: self.anew(n).share(adverts) for n in adverts if self.stays(n, "share")})
        for name, box in boxes.items():
            if self.stays(name, "mask"):
                self.masked[name] = self.anew(name).mask(box, words[name].copy(), BASIS)
                coordinator.add(name, self.masked[name])
        self.survivors = coordinator.survivors()
        confirmations = coordinator.confirmed(
            {n: self.anew(n).confirm(self.survivors) for n in sorted(self.survivors) if self.stays(n, "confirm")}
        )
        self.openings = {n: self.anew(n).open(confirmations) for n in confirmations if self.stays(n, "open")}
        return coordinator.total(self.openings, BASIS)

    def anew(self, name: str) -> Node:
        """The node as the process of the next message finds it."""
        node = Node.restored(name, self.terms, KEYS[name], ENROLLED, self.nodes[name].state())
        self.nodes[name] = node
        return node


def terms_of(count: int, **changed) -> Terms:
    settings = {"federation": "f", "run": "r", "round": 1, "phase": 0, "length": 50, "limit": 2.0}
    return Terms(**settings | {"nodes": tuple(sorted(KEYS)[:count])} | changed)


def drawn(terms: Terms, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        name: terms.fixed_point.encode(generator.uniform(-3, 3, terms.length), seed.to_bytes(32))[0] for name in terms.nodes
    }


def plain(words: Mapping[str, np.ndarray], names: frozenset[str]) -> np.ndarray:
    return np.sum([words[name].astype(np.uint64) for name in names], axis=0).astype(np.uint32)


@settings(max_examples=60)
@given(st.integers(3, 16), st.integers(0, 2**31), st.data())
def test_the_unmasked_sum_is_the_plain_sum_to_the_bit_whoever_drops_out_down_to_the_threshold(count, seed, data):
    """The oracle adds the words in 64 bits. Those who fall silent do so at any stage."""
    check_a_sum(count, seed, data)


@pytest.mark.slow
@settings(max_examples=500)
@given(st.integers(3, 32), st.integers(0, 2**31), st.data())
def test_500_sums_of_3_to_32_nodes_are_the_plain_sums_to_the_bit(count, seed, data):
    check_a_sum(count, seed, data)


def check_a_sum(count, seed, data):
    neighbours = data.draw(st.sampled_from([0, 0, 12]))
    terms = terms_of(count, length=data.draw(st.integers(1, 70)), neighbours=neighbours)
    # In a ring of neighbours a threshold of every neighbourhood must stay, so few leave there.
    most = count - terms.fewest() if not neighbours or count <= neighbours + 1 else 2
    leaving = random.Random(seed).sample(terms.nodes, data.draw(st.integers(0, most)))
    silent = {name: data.draw(st.sampled_from(STAGES)) for name in leaving}
    words, sums = drawn(terms, seed), Sum(terms, silent)
    total = sums.run(words)
    assert sums.survivors == {name for name in terms.nodes if sums.stays(name, "mask")}
    assert np.array_equal(total, plain(words, sums.survivors))


@settings(max_examples=40)
@given(st.integers(3, 12), st.sampled_from(STAGES), st.integers(0, 2**31))
def test_below_the_threshold_at_any_stage_the_sum_is_given_up(count, stage, seed):
    terms = terms_of(count)
    leaving = random.Random(seed).sample(terms.nodes, count - terms.fewest() + 1)
    with pytest.raises(SecureSumError):
        Sum(terms, dict.fromkeys(leaving, stage)).run(drawn(terms, seed))


def test_what_the_coordinator_holds_before_anything_is_opened_looks_random():
    """Of 40 vectors of zeros, masked: the words' high bits are set half of the time (within five standard deviations)."""
    terms = terms_of(40, length=2000)
    sums = Sum(terms)
    sums.run({name: np.zeros(2000, np.uint32) for name in terms.nodes})
    held = np.stack([*sums.masked.values()])
    for bit in (0, 31):
        share = float(np.mean(held >> bit & 1))
        assert abs(share - 0.5) < 5 * 0.5 / held.size**0.5


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=30), st.integers(1, 64))
def test_fixed_point_errs_by_less_than_one_step_a_node_and_never_overflows(values, nodes):
    """Closed form: stochastic rounding moves each value by less than a step; all at the limit still decode to their sum."""
    point = terms_of(max(3, nodes) if nodes <= 40 else 40).fixed_point
    total = np.zeros(len(values), np.uint32)
    for _ in range(point.nodes):
        total += point.encode(values)[0]
    expected = point.nodes * np.array(values)
    assert np.abs(point.decode(total) - expected).max() <= point.nodes / point.scale


def test_rounding_has_no_bias():
    """The mean of n roundings is within five standard errors (half a step over the root of n at most) of the value."""
    point = terms_of(3).fixed_point
    value = 1.2345678901 / 3
    words, _ = point.encode(np.full(200_000, value))
    assert abs(point.decode(words).mean() - value) < 5 * 0.5 / point.scale / 200_000**0.5


@pytest.mark.parametrize("values", [[float("nan")], [float("inf")]])
def test_what_is_no_number_is_not_sent(values):
    with pytest.raises(SecureSumError):
        terms_of(3).fixed_point.encode(values)


def test_values_beyond_the_limit_are_clipped_and_counted():
    point = terms_of(3).fixed_point
    words, clipped = point.encode([5.0, -5.0, 1.0])
    assert clipped == 2
    assert point.decode(words) == pytest.approx([2.0, -2.0, 1.0], abs=2 / point.scale)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"nodes": ("a", "b")}, "2 nodes"),
        ({"nodes": ("a", "a", "b")}, "2 nodes"),
        ({"neighbours": 3}, "even"),
        ({"share": 0.5}, "half"),
        ({"length": 0}, "values"),
        ({"limit": 0.0}, "limit"),
        ({"limit": float("nan")}, "limit"),
    ],
)
def test_terms_that_would_hide_nobody_or_overflow_are_refused(changed, said):
    with pytest.raises(SecureSumError, match=said):
        terms_of(3, **changed)


# A coordinator or a network that lies ---------------------------------------------------------------------------------------


def started(count: int = 5):
    terms = terms_of(count)
    nodes = {name: Node(name, terms, KEYS[name], ENROLLED) for name in terms.nodes}
    return terms, nodes, {name: node.advertise() for name, node in nodes.items()}


def test_a_swapped_key_is_noticed_before_anything_is_shared():
    terms, nodes, adverts = started()
    first, second = terms.nodes[:2]
    stranger = Node(second, terms, Ed25519PrivateKey.generate(), ENROLLED).advertise()
    for lie in (
        adverts | {second: stranger},  # the coordinator's own keys
        adverts | {second: replace(adverts[second], masking=stranger.masking)},
        adverts | {second: replace(adverts[second], sealing=stranger.sealing)},
        adverts | {second: replace(adverts[second], commitment=stranger.commitment)},
        adverts | {second: adverts[terms.nodes[2]]},  # another node's
        adverts | {"node-39": adverts[second]},  # one that was not asked
    ):
        with pytest.raises(SecureSumError):
            replay(nodes[first], terms).share(lie)


def replay(node: Node, terms: Terms) -> Node:
    return Node.restored(node._name, terms, KEYS[node._name], ENROLLED, node.state())


def test_keys_made_for_another_sum_do_not_serve_this_one():
    _, nodes, adverts = started()
    for changed in (
        {"round": 2},
        {"phase": 1},
        {"run": "s"},
        {"federation": "g"},
        {"limit": 3.0},
        {"length": 51},
        {"asked": "b"},
    ):
        other = terms_of(5, **changed)
        late = {name: Node(name, other, KEYS[name], ENROLLED) for name in other.nodes}
        fresh = {name: node.advertise() for name, node in late.items()}
        stale = fresh | {other.nodes[1]: adverts[other.nodes[1]]}
        with pytest.raises(SecureSumError):
            late[other.nodes[0]].share(stale)
        with pytest.raises(SecureSumError, match="other terms"):
            Node.restored(other.nodes[0], other, KEYS[other.nodes[0]], ENROLLED, nodes[other.nodes[0]].state())


def test_no_node_gives_both_secrets_of_another_whatever_it_is_told():
    """Two stories: to some the coordinator says that a node stayed, to others that it left. Nobody opens under a split list."""
    sums = Sum(terms_of(6))
    sums.run(drawn(sums.terms, 1))
    for name, opening in sums.openings.items():
        assert not opening.seeds.keys() & opening.keys.keys()
        with pytest.raises(SecureSumError):
            sums.nodes[name].open({})  # a second time, for the rest
    terms, nodes, adverts = started(6)
    boxes = {name: {} for name in terms.nodes}
    for name, node in nodes.items():
        for holder, sealed in node.share(adverts).items():
            boxes[holder][name] = sealed
    for name, node in nodes.items():
        node.mask(boxes[name], np.zeros(terms.length, np.uint32))
    everyone, without = frozenset(terms.nodes), frozenset(terms.nodes[:-1])
    told = {name: without if at < 3 else everyone for at, name in enumerate(terms.nodes)}
    signed = {name: node.confirm(told[name]) for name, node in nodes.items()}
    for name, node in nodes.items():
        same = {other: signature for other, signature in signed.items() if told[other] == told[name]}
        with pytest.raises(SecureSumError):  # 3 of 6 agree, 4 are needed
            replay(node, terms).open(same)
        with pytest.raises(SecureSumError):
            replay(node, terms).open(signed)


def test_a_coordinator_cannot_part_those_who_stay_from_each_other_by_whose_shares_it_hands_on():
    """Nine nodes, six are needed. The victim is sent the shares of five, all of whom but the coordinator's two are then said to
    have left: what would hide it were given away. With ``2 t > n + c`` (12 > 11) this must fail (Bonawitz et al. 2017, 6.2).
    """
    terms, nodes, adverts = started(9)
    victim, *others = terms.nodes
    friends, dropped, stayed = others[:2], others[2:5], others[5:]
    boxes = {name: {} for name in terms.nodes}
    for name, node in nodes.items():
        for holder, sealed in node.share(adverts).items():
            boxes[holder][name] = sealed
    boxes[victim] = {name: boxes[victim][name] for name in (*friends, *dropped)}
    for name, node in nodes.items():
        node.mask(boxes[name], np.zeros(terms.length, np.uint32))
    with pytest.raises(SecureSumError, match="never sent"):
        nodes[victim].confirm(frozenset([victim, *friends, *stayed]))


def test_what_nodes_that_were_told_different_things_send_adds_up_to_nothing():
    """One node is told another basis. All words are zeros, and so would be any sum of some; what comes out looks drawn."""
    terms = terms_of(5, length=2000)
    nodes = {name: Node(name, terms, KEYS[name], ENROLLED) for name in terms.nodes}
    coordinator = Coordinator(terms, ENROLLED)
    adverts = coordinator.advertised({name: node.advertise() for name, node in nodes.items()})
    boxes = coordinator.routed({name: node.share(adverts) for name, node in nodes.items()})
    for at, (name, node) in enumerate(nodes.items()):
        coordinator.add(name, node.mask(boxes[name], np.zeros(2000, np.uint32), BASIS if at else b"another"))
    confirmed = coordinator.confirmed({name: node.confirm(coordinator.survivors()) for name, node in nodes.items()})
    openings = {name: node.open(confirmed) for name, node in nodes.items()}
    for told in (BASIS, b"another"):
        total = coordinator.total(openings, told)
        assert np.count_nonzero(np.abs(total.view(np.int32).astype(np.int64)) < 2**24) < 40  # 16 are expected


def test_steps_out_of_order_or_twice_are_refused():
    terms, nodes, adverts = started()
    node = nodes[terms.nodes[0]]
    with pytest.raises(SecureSumError):
        node.advertise()
    with pytest.raises(SecureSumError):
        node.mask({}, np.zeros(terms.length, np.uint32))
    node.share(adverts)
    with pytest.raises(SecureSumError):
        node.share(adverts)


def test_a_changed_share_or_a_vector_of_another_length_ends_in_a_refusal():
    terms, nodes, adverts = started()
    boxes = {name: {} for name in terms.nodes}
    for name, node in nodes.items():
        for holder, sealed in node.share(adverts).items():
            boxes[holder][name] = sealed
    node = nodes[terms.nodes[0]]
    sender = next(iter(boxes[terms.nodes[0]]))
    sealed = boxes[terms.nodes[0]][sender]
    flipped = bytes([sealed[20] ^ 1])
    for lie in (
        sealed[:20] + flipped + sealed[21:],
        sealed[:-1],
        b"",
        os.urandom(len(sealed)),
        boxes[terms.nodes[1]][terms.nodes[2]],
    ):
        with pytest.raises(SecureSumError):
            replay(node, terms).mask(boxes[terms.nodes[0]] | {sender: lie}, np.zeros(terms.length, np.uint32))
    with pytest.raises(SecureSumError):
        replay(node, terms).mask(boxes[terms.nodes[0]], np.zeros(terms.length + 1, np.uint32))


def test_one_node_that_gives_wrong_shares_is_set_aside_and_more_than_can_be_spared_end_the_sum():
    """Of five nodes four shares are needed."""
    sums, words = Sum(terms_of(5)), drawn(terms_of(5), 3)
    total = sums.run(words)
    liars = sums.terms.nodes[:2]
    lies = {name: Opening({other: os.urandom(66) for other in sums.openings[name].seeds}, {}) for name in liars}
    assert np.array_equal(sums.coordinator.total(sums.openings | {liars[0]: lies[liars[0]]}, BASIS), total)
    assert sums.coordinator.refused.keys() == {liars[0]}
    with pytest.raises(SecureSumError):
        sums.coordinator.total(sums.openings | lies, BASIS)


def test_a_node_whose_keys_would_make_all_others_give_up_is_left_out():
    """X25519's points of small order, one key for two purposes, another node's key: signed as they should be."""
    terms, _, adverts = started(6)
    coordinator = Coordinator(terms, ENROLLED)
    first, second, third, fourth = terms.nodes[:4]

    def signed(name, **changed):
        advert = replace(adverts[name], **changed)
        return replace(advert, signature=sign(KEYS[name], ADVERT, advert.content(terms.digest, name)))

    hostile = {
        second: signed(second, masking=bytes(32)),
        third: signed(third, masking=adverts[third].sealing),
    }
    assert coordinator.advertised(adverts | hostile).keys() == set(terms.nodes) - hostile.keys()
    assert coordinator.refused.keys() == hostile.keys()
    thief = {fourth: signed(fourth, sealing=adverts[first].sealing)}
    assert Coordinator(terms, ENROLLED).advertised(adverts | thief).keys() == set(terms.nodes) - {fourth}
