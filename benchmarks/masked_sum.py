"""One secure sum in this process, in which nobody falls silent: what the coordinator holds of each node, and what it opens."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from protocol.secure_sum.coordinator import Coordinator
from protocol.secure_sum.fixed_point import Words
from protocol.secure_sum.node import Node
from protocol.secure_sum.terms import Terms


@dataclass(frozen=True)
class Seen:
    """What the coordinator sees.

    Attributes:
        masked: Each node's vector as it arrives.
        total: The sum, decoded.
    """

    masked: Mapping[str, Words]
    total: NDArray[np.float64]


def summed(terms: Terms, words: Mapping[str, Words]) -> Seen:
    """Both halves of ``protocol.secure_sum`` over words that are encoded already, with keys for this once.

    Args:
        terms: Of the sum.
        words: By each of its nodes, ``(length,)``.
    """
    keys = {name: Ed25519PrivateKey.generate() for name in terms.nodes}
    enrolled = {name: key.public_key() for name, key in keys.items()}
    coordinator = Coordinator(terms, enrolled)
    nodes = {name: Node(name, terms, key, enrolled) for name, key in keys.items()}
    adverts = coordinator.advertised({name: node.advertise() for name, node in nodes.items()})
    boxes = coordinator.routed({name: node.share(adverts) for name, node in nodes.items()})
    masked = {name: node.mask(boxes[name], words[name].copy()) for name, node in nodes.items()}
    for name, vector in masked.items():
        coordinator.add(name, vector)
    survivors = coordinator.survivors()
    confirmed = coordinator.confirmed({name: node.confirm(survivors) for name, node in nodes.items()})
    total = coordinator.total({name: node.open(confirmed) for name, node in nodes.items()})
    return Seen(masked, terms.fixed_point.decode(total))
