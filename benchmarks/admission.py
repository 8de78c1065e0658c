"""Every hostile reply of ``benchmarks.hostile`` through real rounds, and Flower's FedAvg on the same replies beside it.

    python -m benchmarks.admission

Thirteen nodes, six of which send another case of the table in every round but the first; the coordinator is the real one. A
second federation, in which those six are silent, must arrive at the same global adapter bit by bit after every round. FedAvg
gets the same messages, one hostile reply beside the good ones at a time. Then honest nodes train for false alarms. The last
line is JSON.
"""

import argparse
import collections
import json
import logging
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high
from typing import get_args

import numpy as np
from flwr.app import ArrayRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.hostile import BASE, DENSE, MODULES, RANK, Case, Reply, cases
from client.node import Node
from protocol.adapter import Adapter, Factors
from protocol.codec import WireFormat
from protocol.federation import Federation
from protocol.manifest import Manifest
from protocol.product_space import split
from protocol.records import METRICS, Offer, metric_record, offer_records, read_call, update_records
from protocol.update import Update
from server.rounds import run
from simulations.grid import InProcessGrid

NODES = 13
HOSTILE = (1, 2, 5, 8, 10, 13)  # fewer than half, which is what the bound on norms needs
WIRES: tuple[WireFormat, ...] = get_args(WireFormat)
EXAMPLES = 8
app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    offer = Offer(
        name=f"node-{context.node_id}", base_digest=BASE, method="lora", precision="fp32", r=RANK, modules=MODULES, dense=DENSE
    )
    return Message(offer_records(offer), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """An honest update without a model: a small step from what was sent, drawn from node and round."""
    received = read_call(message.content)
    call, sent = received.call, received.adapter
    rng = np.random.default_rng([context.node_id, call.round])

    def step(start: np.ndarray) -> np.ndarray:
        return (0.9 * start + rng.normal(scale=0.1, size=start.shape)).astype(np.float32)

    factors = {}
    for module, (d_out, d_in) in MODULES.items():
        begun = (
            split(sent.factors[module], RANK)[0]
            if module in sent.factors
            else Factors(np.zeros((0, d_in)), np.zeros((d_out, 0)))
        )
        room = RANK - begun.r
        a = np.concatenate([begun.A, rng.normal(size=(room, d_in))])
        factors[module] = Factors(step(a), step(np.concatenate([begun.B, np.zeros((d_out, room))], axis=1)))
    dense = {name: step(sent.dense.get(name, np.zeros(shape))) for name, shape in DENSE.items()}
    manifest = Manifest(
        base_digest=BASE,
        kind="update",
        method="lora",
        r=RANK,
        precision="fp32",
        federation=call.federation,
        round=call.round,
        parent=call.digest,
        num_examples=EXAMPLES,
    )
    rows = dict.fromkeys(DENSE, np.array([True, True, context.node_id not in HOSTILE]))
    update = Update(Adapter(factors, dense), manifest, rows)
    return Message(update_records(update, call.wire, {"train-loss": 1.0}, received.trained()), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:  # noqa: ARG001
    return Message(RecordDict({METRICS: metric_record({"loss": 1.0}, EXAMPLES)}), reply_to=message)


class HostileGrid(InProcessGrid):
    """Plays a case of the table per hostile node and round, from the second round on; nodes without one answer with errors.

    Attributes:
        digests: Of the adapter that each round began from.
        replies: What came in, by round and node.
    """

    def __init__(self, table: Sequence[Case] = ()) -> None:
        super().__init__(app, [{} for _ in range(NODES)])
        self._table = table
        self._before: dict[int, RecordDict] = {}
        self.digests: dict[int, str] = {}
        self.replies: dict[int, dict[int, Message]] = collections.defaultdict(dict)

    def answer(self, message: Message) -> Message:
        """The honest reply, or a case."""
        reply = super().answer(message)
        if message.metadata.message_type != MessageType.TRAIN:
            return reply
        call = read_call(message.content).call
        node, number = message.metadata.dst_node_id, call.round
        self.digests[number] = call.digest
        if node in HOSTILE:
            reply = self._forged(message, reply.content, place(node, number))
        self.replies[number][node] = reply
        return reply

    def _forged(self, message: Message, honest: RecordDict, at: int) -> Message:
        node = message.metadata.dst_node_id
        before, self._before[node] = self._before.get(node), honest
        if not 0 <= at < len(self._table):
            return Message(Error(1, "silent"), reply_to=message)
        records = RecordDict({key: record.copy() for key, record in honest.items()})
        self._table[at].forge(Reply(records, before))
        return Message(records, reply_to=message)


def place(node: int, number: int) -> int:
    """Where in the table the case is that a hostile node plays in a round."""
    return (number - 2) * len(HOSTILE) + HOSTILE.index(node)


@dataclass(frozen=True)
class Verdict:
    """What became of one case.

    Attributes:
        case: Which.
        reason: Why the coordinator quarantined it; None if it did not.
        lost: Good replies of its round that were not merged.
        same: Whether the next global adapter is bit by bit the one of a round in which the node was silent.
        replies: The good ones of the round.
        reply: What was sent.
    """

    case: Case
    reason: str | None
    lost: int
    same: bool
    replies: Sequence[Message]
    reply: Message

    @property
    def quarantined(self) -> bool:
        """Refused, and for the right reason."""
        return self.reason is not None and re.search(self.case.reason, self.reason) is not None

    @property
    def problem(self) -> str:
        """What is wrong; empty if nothing is."""
        if not self.quarantined:
            return f"found reason {str(self.reason)[:200]!r}, expected {self.case.reason!r}"
        if self.lost:
            return f"{self.lost} good replies were lost"
        return "" if self.same else "the global adapter is another"

    @property
    def fedavg(self) -> str:
        """What Flower's FedAvg does with the same replies: ``crashed``, ``poisoned`` or ``accepted``.

        Poisoned: a tensor of the mean is not finite, or ten times as large as in the mean of the good replies.
        """
        try:
            usual = _sizes(FedAvg().aggregate_train(1, self.replies)[0])
            sizes = _sizes(FedAvg().aggregate_train(1, [*self.replies, self.reply])[0])
        except Exception:  # noqa: BLE001 - whatever it is, it ends Flower's run
            return "crashed"
        return "accepted" if all(size <= 10 * usual[key] for key, size in sizes.items()) else "poisoned"


def play(wire: WireFormat, folder: Path) -> list[Verdict]:
    """The table of a wire format through one federation, and the federation that it is held against."""
    table = cases(wire)
    count = 1 + math.ceil(len(table) / len(HOSTILE))
    hostile, silent = HostileGrid(table), HostileGrid()
    found = run(hostile, federation(wire, count, folder / "hostile"))
    wanted = run(silent, federation(wire, count, folder / "silent"))
    hostile.digests[count + 1], silent.digests[count + 1] = found.adapter.digest(), wanted.adapter.digest()
    verdicts = []
    for record in found.rounds[1:]:
        replies = hostile.replies[record.round]
        good = [reply for node, reply in replies.items() if node not in HOSTILE]
        lost = len(good) - len(record.accepted.keys() & {f"node-{reply.metadata.src_node_id}" for reply in good})
        same = hostile.digests[record.round + 1] == silent.digests[record.round + 1]
        played = [(node, place(node, record.round)) for node in HOSTILE if place(node, record.round) < len(table)]
        verdicts += [
            Verdict(table[at], record.refused.get(f"node-{node}"), lost, same, good, replies[node]) for node, at in played
        ]
    return verdicts


def federation(wire: WireFormat, count: int, output: Path) -> Federation:
    """Of ``count`` rounds; the plan counts steps, so that the number of examples is known; nobody is ever paused."""
    return Federation.model_validate(
        {
            "name": "hostile",
            "plan": {"lora": {"r": RANK}, "training": {"max_steps": 2, "batch_size": EXAMPLES // 2}},
            "rounds": {"count": count, "wire": wire, "evaluate_every": 0, "failures_allowed": 10**5, "timeout_seconds": 60},
            "aggregation": {"rank_cap": 2 * RANK},
            "output": output,
        }
    )


def honest(rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Real training of the embedded model by eight nodes of ranks 4 to 32: replies, those refused, how far apart they are."""
    from simulations.federation import federate
    from simulations.institutions import INSTITUTIONS, rows
    from simulations.scenario import write_rows

    nodes = []
    for at, institution in enumerate(INSTITUTIONS):
        own: list[dict[str, object]] = [dict(row) for row in rows(institution.name, "train")]
        for half in range(2):
            train = folder / f"{institution.name}-{half}.jsonl"
            # Under epochs the number of rows is the number of steps: from all of the half to an eighth of it.
            write_rows(train, own[half :: 2 * 2**at])
            nodes.append(Node(name=train.stem, train=train, evaluate=train, max_rank=(32, 16, 8, 4)[(at + half) % 4]))
    usual = {"learning_rate": 1e-2, "warmup_ratio": 0.05}
    found = {}
    for name, training in {
        "steps": {"batch_size": 16, "max_steps": 12},
        "epochs": {"batch_size": 4, "num_train_epochs": 1},
    }.items():
        plan = {"lora": {"r": 32, "lora_alpha": 64}, "data": {"max_length": 128}, "training": usual | training}
        content: dict[str, object] = {"name": name, "plan": plan, "output": folder / name}
        content["rounds"] = {"count": rounds, "evaluate_every": 0}
        records = federate(Federation.model_validate(content), nodes).rounds
        apart = [max(record.norms.values()) / median_high(record.norms.values()) for record in records]
        refused = [len(record.refused) for record in records]
        found[name] = {"replies": len(nodes) * len(records), "quarantined": sum(refused), "largest_to_median": max(apart)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6, help="real rounds of honest nodes, for false alarms; 0 for none")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    verdicts: list[Verdict] = []
    told: collections.Counter[str] = collections.Counter()
    kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory(prefix="fedge-admission-") as scratch, np.errstate(all="ignore"):
        for wire in WIRES:
            played = play(wire, Path(scratch) / wire)
            verdicts += played
            for verdict in played:
                counts = kinds[verdict.case.kind]
                counts["cases"] += 1
                counts["quarantined"] += verdict.quarantined
                counts[f"fedavg {verdict.fedavg}"] += 1
                told[verdict.fedavg] += 1
                if verdict.problem:
                    print(f"{wire}, {verdict.case.kind}, {verdict.case.name}: {verdict.problem}")
        alarms = honest(options.rounds, Path(scratch) / "honest") if options.rounds else {}
    _print(kinds)
    result = {
        "cases": len(verdicts),
        "quarantined": sum(verdict.quarantined for verdict in verdicts),
        "good_replies_lost": max(verdict.lost for verdict in verdicts),
        "bit_equal": all(verdict.same for verdict in verdicts),
        "fedavg": {key: told[key] for key in ("accepted", "crashed", "poisoned")},
        "honest": alarms,
    }
    print(json.dumps(result))


def _sizes(arrays: ArrayRecord | None) -> dict[str, float]:
    return {key: float(np.linalg.norm(array.numpy().astype(np.float64))) for key, array in (arrays or {}).items()}


def _print(kinds: Mapping[str, Mapping[str, int]]) -> None:
    columns = ("cases", "quarantined", "fedavg accepted", "fedavg poisoned", "fedavg crashed")
    print(f"{'kind':18}" + "".join(f"{column:>17}" for column in columns))
    for kind, counts in kinds.items():
        print(f"{kind:18}" + "".join(f"{counts[column]:17d}" for column in columns))


if __name__ == "__main__":
    main()
