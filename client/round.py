"""One round at a node: choose a plan, load, put the global adapter in, train on fresh rows, make the update."""

import logging
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from client.allowed import check
from client.ladder import Ladder
from client.memory import Memory, path_part
from client.node import Node
from client.personal import Personal
from client.round_plan import (
    Work,
    at_asked_rank,
    counts_steps,
    of_round,
    own_labels,
    rows_from,
    rows_taken,
    stretch,
    trained_rows,
    wish,
    with_what_stayed,
)
from protocol.errors import BaseMismatchError, DataError, ModelError
from protocol.files import keep_private, private_folder
from protocol.manifest import Manifest
from protocol.plan import Plan
from protocol.records import Call, Offer, Received
from protocol.sealed_folder import sealed_folder
from protocol.update import Update
from protocol.wiping import wipe
from strategies import architecture
from strategies.base_model import Base, find, load_tokenizer
from strategies.calibration import read_calibration
from strategies.data.ai_feedback import made, stand_ins
from strategies.data.card import write_beside
from strategies.data.encode import encode, is_usable
from strategies.data.formats import Row
from strategies.data.mixture import Gathered, gathered, probe_rows
from strategies.data.prepared import summary
from strategies.data.splits import window
from strategies.evaluation.measure import measure
from strategies.forgetting import FIGURES
from strategies.methods import registry
from strategies.narrowing import Narrowed, fitted, narrow
from strategies.residents import resident_bytes
from strategies.training import Trained, fit
from strategies.training_place import Safe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from client.example_ledger import ExampleLedger

log = logging.getLogger("flwr")
_SAMPLED = 64
_TOLD = ("train-loss", "train-steps", "energy-kept", "weights-moved", "rate-halved", *FIGURES)


def choose(wish: Plan, node: Node) -> Narrowed:
    """The plan that this node carries out, with its reasons; the reasons stay here.

    Raises:
        HardwareError: Nothing fits this machine's memory.
        ConfigurationError: The plan names what the node does not list.
    """
    check(wish, node)
    narrowed = narrow(wish, node.tier, node.max_rank)
    try:
        known = architecture.read(find(wish.base_model).folder)
        calibration = None if node.described else read_calibration()
        return fitted(narrowed, known, node.hardware(), calibration, resident_bytes(narrowed.chosen))
    except ModelError as error:  # no estimate for such a base or target: the first step shows whether it fits
        return Narrowed(narrowed.chosen, {**narrowed.reasons, "memory": f"not estimated: {error}"})


def join(call: Call, node: Node, memory: Memory | None = None, *, aloud: bool = True) -> Offer:
    """Looks at plan, data and base, and says which adapter this node can train.

    Args:
        call: The coordinator's.
        node: This node's settings.
        memory: Where it is given, one real step shows whether the plan fits, and what was found is kept there.
        aloud: Say what became of rows that are not used as they are; not where the same node joins again in earnest.

    Raises:
        UserError: The base or the data is not there or does not fit the plan or the machine, or the node's adapter is not
            there.
    """
    plan = choose(wish(call, node), node).chosen
    base = find(plan.base_model)
    shape = registry.shape(base, plan)
    own = shape.head if plan.head.local else frozenset()
    tokenizer = load_tokenizer(base)
    found = _rows(plan, node).prepared
    for line in summary(found.report) if aloud else ():
        log.warning("%s: %s", node.name, line)  # what is less than was given is never silent
    named = str(node.train or "tasks")
    for rows, what in ((found.training, named), (found.held_out, str(node.evaluate or named))):
        if not any(is_usable(row, tokenizer, plan.data.max_length, plan.objective) for row in rows):
            raise DataError(_all_too_long(what, plan))
    _probe(plan, node)
    _ledger(plan, node, found.training, base, call.rounds)
    if memory is not None:
        plan = _tried(call, plan, base, node, memory)
    return Offer(
        name=node.name,
        adapter=node.adapter or "",
        base_digest=base.digest,
        method=plan.method,
        precision=plan.precision,
        r=plan.update_rank,
        modules=dict(shape.modules),
        embeddings=shape.embeddings,
        dense={name: size for name, size in shape.dense.items() if name not in own},
    )


def train(received: Received, node: Node, memory: Memory) -> Work:
    """Trains one round. Asked for the same round again, it gives the same update to the bit.

    Where each row is private (``training.example_privacy``) rows and noise are drawn anew, so that it gives another, which
    costs again.

    Args:
        received: The coordinator's call and its adapter; this node trains the part of it that the call says.
        node: This node's settings.
        memory: Keeps what must not leave (``client.personal``).

    Raises:
        BaseMismatchError: The adapter is of another base than the one here.
        PrivacyError: The rows' budget is spent; nothing is trained.
    """
    call = received.call
    plan, base = at_asked_rank(received, choose(call.plan, node).chosen), _same_base(call)
    rows = training_rows(plan, node)
    ledger = _ledger(plan, node, rows, base, call.rounds - call.first + 1)
    own = None if ledger else own_labels(rows, plan)  # which labels there are, a row may tell
    taken = _rows_of(call, rows, plan, base)
    personal = Personal.of(call, registry.shape(base, plan).head)
    parts = personal.before(memory, call.round)
    start = personal.joined(received.adapter, parts)
    watched = held_out_rows(plan, node) if plan.training.eval_steps else []
    learnt = made(taken, of_round(plan, call.round), base, start, training=True)
    held_out = made(watched, plan, base, received.reference, training=False).rows

    own_folder, safe = _own_folder(call, node), _safe(call, node)

    def attempt(plan: Plan) -> Trained:
        return fit(
            of_round(_with_noise_of(ledger, plan), call.round),
            base,
            learnt.rows,
            held_out,
            folder=own_folder,
            whole=node.whole_model,
            safe=safe,
            progress=node.progress,
            start=start,
            reference=received.reference,
            fresh=call.fresh,
            trains=call.trains,
            own_labels=own,
            stretch=stretch(plan, call),
            probe=_probe(plan, node),
        )

    trained, plan = Ladder(call, plan, node, memory, _usable(rows, base, plan)).train(attempt)
    costs = {}
    if ledger and trained.sampled:
        costs = {"example-epsilon": ledger.spend(trained.sampled, call.round)}  # before anything of it leaves
    _leave(own_folder, plan, node, base, safe)
    personal.remember(memory, call.round, parts, trained.adapter)
    trained_on = len({id(row) for row in learnt.rows})  # a row that is drawn again is no other row
    shared = personal.shared(trained.adapter if call.fresh else with_what_stayed(trained.adapter, start, call.r))
    # How many rows there are, rows may tell: where each is private, the plan's own number is.
    counted = rows_taken(plan) if ledger and rows_taken(plan) else min(trained_on, rows_taken(plan) or trained_on)
    manifest = Manifest(
        base_digest=base.digest,
        kind="update",
        method=plan.method,
        r=max(shared.ranks().values(), default=0),
        precision=plan.precision,
        federation=call.federation,
        round=call.round,
        parent=call.digest,
        num_examples=1 if call.privacy else counted,
    )
    update = Update(shared, manifest, trained_rows(shared, own, registry.shape(base, plan).head, plan))
    told = {name: value for name, value in trained.metrics.items() if name in _TOLD}
    return Work(update, told, {**trained.metrics, **learnt.metrics, **costs})


def _tried(call: Call, plan: Plan, base: Base, node: Node, memory: Memory) -> Plan:
    """The plan with which one real step, on the longest rows that a batch can be made of, did not run out of memory."""
    rows, tokenizer = stand_ins(training_rows(plan, node), plan), load_tokenizer(base)
    longest = sorted(rows, key=lambda row: len(repr(row)), reverse=True)

    def attempt(plan: Plan) -> Trained:
        one = plan.training.model_copy(
            update={"max_steps": 1, "gradient_accumulation_steps": 1, "eval_steps": None, "early_stopping_patience": None}
        )
        if one.example_privacy:  # any noise, for nothing of it is kept: all of these rows at once
            any_noise = one.example_privacy.model_copy(update={"noise_multiplier": 1.0})
            one = one.model_copy(update={"example_privacy": any_noise})
        usable = (row for row in longest if is_usable(row, tokenizer, plan.data.max_length, plan.objective))
        few = list(islice(usable, plan.training.batch_size))
        return fit(plan.model_copy(update={"training": one}), base, few, safe=_safe(call, node))

    return Ladder(call, plan, node, memory, _usable(rows, base, plan)).train(attempt)[1]


def evaluate(received: Received, node: Node, memory: Memory) -> tuple[dict[str, float], int]:
    """Measures the global adapter, with this node's own parts, on its held-out rows; returns metrics and how many rows.

    Of several tasks each has its figures beside those of all, under ``TASK/``.
    """
    call = received.call
    plan, base = choose(call.plan, node).chosen, _same_base(call)
    found = _rows(plan, node)
    personal = Personal.of(call, registry.shape(base, plan).head)
    adapter = personal.joined(received.adapter, personal.before(memory, call.round + 1))
    parts = {"": found.prepared.held_out, **{f"{name}/": rows for name, rows in found.tasks.items()}}
    told = {
        f"{of}{figure}": value
        for of, rows in parts.items()
        for figure, value in measure(plan, base, rows, adapter, received.reference).items()
    }
    return told, len(found.prepared.held_out)


def training_rows(plan: Plan, node: Node) -> list[Row]:
    """Rows that may train: all of the file, or all but the held-out share; treated as plan and institution say."""
    return list(_rows(plan, node).prepared.training)


def held_out_rows(plan: Plan, node: Node) -> list[Row]:
    """Rows that must not train."""
    return list(_rows(plan, node).prepared.held_out)


def _rows(plan: Plan, node: Node) -> Gathered:
    """Rows that train and rows that are held out, of all tasks and what is replayed beside them."""
    return gathered(node.treating(plan), node.sources(), node.replay, rows_taken(plan))


def _probe(plan: Plan, node: Node) -> list[Row]:
    """Rows on which forgetting is measured; none where the plan sets no bound or the node has no probe."""
    return probe_rows(node.probe, node.treating(plan)) if node.probe and plan.forgetting else []


def _ledger(plan: Plan, node: Node, rows: Sequence[Row], base: Base, rounds: int) -> "ExampleLedger | None":
    """The budget of each row, asked whether one more round fits; None where the plan promises rows nothing."""
    if plan.training.example_privacy is None:
        return None
    from client.example_ledger import ExampleLedger

    tokenizer = load_tokenizer(base)
    usable = sum(is_usable(row, tokenizer, plan.data.max_length, plan.objective) for row in rows)
    ledger = ExampleLedger(plan, node, usable, rounds)
    ledger.check()
    return ledger


def _with_noise_of(ledger: "ExampleLedger | None", plan: Plan) -> Plan:
    """The plan, as a rung of the ladder left it, with the noise that the budget was asked for."""
    if ledger is None:
        return plan
    private = {"example_privacy": ledger.plan.training.example_privacy}
    return plan.model_copy(update={"training": plan.training.model_copy(update=private)})


def _safe(call: Call, node: Node) -> Safe | None:
    """Seals what a round leaves here, as of this federation and this round."""
    vault = node.sealing()
    return Safe(vault, {"federation": call.federation, "round": call.round}) if vault else None


def _own_folder(call: Call, node: Node) -> Path | None:
    """Where the round's checkpoints and logs lie: closed to others before anything does."""
    if node.folder is None:
        return None
    of_all = node.folder / path_part(call.federation)
    private_folder(of_all)
    return of_all / f"round-{call.round:04d}"


def _leave(folder: Path | None, plan: Plan, node: Node, base: Base, safe: Safe | None) -> None:
    """What stays of a round on this node's disk: a card of its data, its files for its own account's eyes alone, or none."""
    if folder:
        _describe(folder.parent, plan, node, base, safe)
        if node.wipe and folder.exists():
            wipe(folder)
    if node.whole_model and node.whole_model.exists():
        keep_private(node.whole_model)


def _describe(folder: Path, plan: Plan, node: Node, base: Base, safe: Safe | None) -> None:
    """The data card stays at the node."""
    rows, treating, tokenizer = _rows(plan, node).prepared, node.treating(plan), load_tokenizer(base)
    if safe is None:
        write_beside(folder, rows, treating, tokenizer)
        keep_private(folder)
        return
    with sealed_folder(folder, safe.vault, {"federation": safe.what["federation"], "kind": "data-card"}) as opened:
        write_beside(opened.place, rows, treating, tokenizer)


def _rows_of(call: Call, rows: Sequence[Row], plan: Plan, base: Base) -> list[Row]:
    """The round's rows: all, or as many usable ones as its steps take."""
    if not counts_steps(plan, call):
        return list(rows)
    tokenizer = load_tokenizer(base)
    blocks = plan.objective == "pretraining" or plan.training.packing
    wanted = _texts(plan, rows, tokenizer) if blocks else rows_taken(plan)
    return rows_from(rows, call, plan, wanted, lambda row: is_usable(row, tokenizer, plan.data.max_length, plan.objective))


def _all_too_long(named: str, plan: Plan) -> str:
    return f"{named}: no row has anything to learn from within {plan.data.max_length} tokens; raise data.max_length"


def _texts(plan: Plan, rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> int:
    """Texts, or packed rows, that fill as many blocks as the plan's steps take, at the mean length of some: always the same."""
    some = [rows[at] for at in window(len(rows), 0, min(len(rows), _SAMPLED), plan.training.seed)]
    tokens = sum(len(row["input_ids"]) for row in encode(some, tokenizer, plan.data.max_length, plan.objective).rows)
    return max(1, round(rows_taken(plan) * plan.data.max_length * len(some) / tokens))


def _usable(rows: Sequence[Row], base: Base, plan: Plan) -> Callable[[int], bool]:
    """Whether half of the rows leave something to learn within so many tokens."""

    def usable(tokens: int) -> bool:
        looked, tokenizer = rows[:200], load_tokenizer(base)
        return 2 * sum(is_usable(row, tokenizer, tokens, plan.objective) for row in looked) >= len(looked)

    return usable


def _same_base(call: Call) -> Base:
    base = find(call.plan.base_model)
    if call.manifest and call.manifest.base_digest != base.digest:
        raise BaseMismatchError(
            f"the federation trains base {call.manifest.base_digest[:12]}, {base.folder} is {base.digest[:12]}"
        )
    return base
