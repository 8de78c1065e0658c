"""What a node does in one secure sum, beside Flower's SecAgg+ in the same run: shares, masks, encoding; seconds and bytes.

    python -m benchmarks.secure_sum [--values 4190000] [--nodes 8]

Both are the projects' own code, from a vector of float32 to what is uploaded: words of 32 bits here, int64 at Flower's, with
the shares for everybody else; no network, one process, one thread. Flower's masks come from a 32-bit seed of NumPy's generator
and its key adverts are not signed; these are AES-256 and Ed25519. The last line is JSON.
"""

import argparse
import importlib
import json
import statistics
import time
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord
from flwr.common import ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import Key
from numpy.typing import NDArray

from protocol.secure_sum.node import Node
from protocol.secure_sum.terms import Terms

# The package shows a function under the module's name.
flower: Any = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
Vector = NDArray[np.float32]
_LARGEST = 8.0
_FLOWER = {Key.CLIPPING_RANGE: _LARGEST, Key.TARGET_RANGE: 1 << 22, Key.MOD_RANGE: 1 << 32, Key.MAX_WEIGHT: 1000.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=4_190_000, help="length of the vector")
    parser.add_argument("--nodes", type=int, default=8, help="how many nodes the sum has")
    parser.add_argument("--repeats", type=int, default=3)
    settings = parser.parse_args()
    cases = {(settings.values, settings.nodes): None}
    cases |= dict.fromkeys((settings.values // part, settings.nodes) for part in (16, 4))
    cases |= dict.fromkeys((settings.values // 4, count) for count in (4, 16, 32))
    print(f"{'values':>10} {'nodes':>6} {'ours s':>8} {'Flower s':>9} {'ratio':>6} {'ours upload':>12} {'Flower upload':>14}")
    rows = []
    for values, nodes in cases:
        vector = np.random.default_rng(0).standard_normal(values).astype(np.float32)
        # By turns: what else the machine does weighs on both.
        ours, theirs = zip(*((_ours(vector, nodes), _flowers(vector, nodes)) for _ in range(settings.repeats)), strict=True)
        row = {
            "values": values,
            "nodes": nodes,
            "ours_seconds": statistics.median(seconds for seconds, _ in ours),
            "flower_seconds": statistics.median(seconds for seconds, _ in theirs),
            "upload_ratio": ours[0][1] / vector.nbytes,
            "flower_upload_ratio": theirs[0][1] / vector.nbytes,
        }
        rows.append(row)
        ratio = row["flower_seconds"] / row["ours_seconds"]
        print(
            f"{values:10,} {nodes:6} {row['ours_seconds']:8.3f} {row['flower_seconds']:9.3f} {ratio:6.2f} "
            f"{row['upload_ratio']:12.4f} {row['flower_upload_ratio']:14.4f}"
        )
    told = {name: rows[0][name] for name in ("ours_seconds", "flower_seconds", "upload_ratio")}
    print(json.dumps(told | {"cases": rows}))


def _ours(vector: Vector, count: int) -> tuple[float, int]:
    """Seconds of one node's part in a sum of so many, and bytes that it uploads."""
    names = [f"node-{number:02d}" for number in range(count)]
    keys = {name: Ed25519PrivateKey.generate() for name in names}
    enrolled = {name: key.public_key() for name, key in keys.items()}
    terms = Terms("f", "r", 1, 0, vector.size, _LARGEST, tuple(names))
    me, *others = (Node(name, terms, keys[name], enrolled) for name in names)
    adverts = {name: node.advertise() for name, node in zip(names[1:], others, strict=True)}
    begun = time.perf_counter()
    adverts[names[0]] = me.advertise()
    sealed = me.share(adverts)
    seconds = time.perf_counter() - begun
    box = {name: node.share(adverts)[names[0]] for name, node in zip(names[1:], others, strict=True)}
    begun = time.perf_counter()
    words = me.mask(box, terms.fixed_point.encode(vector)[0])
    seconds += time.perf_counter() - begun
    return seconds, words.nbytes + sum(map(len, sealed.values()))


def _flowers(vector: Vector, count: int) -> tuple[float, int]:
    """The same of Flower's SecAgg+."""
    threshold = -(-2 * count // 3)
    told = ConfigRecord({**_FLOWER, Key.SAMPLE_NUMBER: count, Key.SHARE_NUMBER: count, Key.THRESHOLD: threshold})
    setup, share, collect = (getattr(flower, name) for name in ("_setup", "_share_keys", "_collect_masked_vectors"))
    states = [flower.SecAggPlusState(nid=number) for number in range(count)]
    for state in states[1:]:
        setup(state, told)
    begun = time.perf_counter()
    setup(states[0], told)
    keys = ConfigRecord({str(state.nid): [state.pk1, state.pk2] for state in states})
    mine = share(states[0], keys)
    seconds = time.perf_counter() - begun
    received = []
    for state in states[1:]:
        sent = share(state, keys)
        received.append(sent[Key.CIPHERTEXT_LIST][sent[Key.DESTINATION_LIST].index(0)])
    box = ConfigRecord({Key.CIPHERTEXT_LIST: received, Key.SOURCE_LIST: [state.nid for state in states[1:]]})
    begun = time.perf_counter()
    masked = collect(states[0], box, 500, ndarrays_to_parameters([vector]))
    seconds += time.perf_counter() - begun
    uploads = [*masked[Key.MASKED_PARAMETERS], *mine[Key.CIPHERTEXT_LIST]]
    return seconds, sum(map(len, uploads))


if __name__ == "__main__":
    main()
