"""One round at a device, without PyTorch: what ``client.round`` does, over a signed bundle with numpy and onnxruntime."""

import logging
import math
from collections.abc import Sequence

import numpy as np

from client import device_own
from client.allowed import check
from client.device_bundle import Opened, check_plan, left_out, opened
from client.device_rows import Encoding, gathered_rows
from client.device_tier import check_now, narrowed, why_not_now
from client.device_training import Parts, Round, divided, fit
from client.memory import Memory
from client.node import Node
from client.personal import Personal
from client.round_plan import (
    Work,
    at_asked_rank,
    of_round,
    own_labels,
    rows_taken,
    stretch,
    trained_rows,
    wish,
    with_what_stayed,
)
from edge.runtime.adapting.aside import Aside
from edge.runtime.adapting.budget import Senses
from edge.runtime.adapting.passes import Example, Passes
from edge.runtime.adapting.rows import Task
from protocol.adapter import Adapter
from protocol.errors import BaseMismatchError, FedgeError
from protocol.files import private_folder
from protocol.manifest import Manifest
from protocol.plan import QUANTISED, Plan
from protocol.records import Call, Offer, Received
from protocol.update import Update
from strategies.data.prepared import summary
from strategies.narrowing import Narrowed

log = logging.getLogger("flwr")
_TOLD = ("train-loss", "train-steps")
_LARGEST_NATS = 700.0  # exp of more is no float64
_TASKS: dict[str, Task] = {"sft": "sft", "dpo": "dpo", "classification": "classification"}


def choose(wish: Plan, node: Node) -> Narrowed:
    """The plan that this device carries out, with its reasons; the reasons stay here.

    Raises:
        ConfigurationError: It holds what no device can do, or names what the node does not list.
        BundleError: The bundle does not hold, or has no training graphs.
        ModelError: The bundle is for another task.
    """
    check(wish, node)
    check_plan(wish)
    bundle = opened(node)
    bundle.check(wish)
    chosen, reasons = narrowed(wish, node, bundle.gradients.largest_rank)
    held = bundle.precision
    if held != chosen.precision:
        reasons["precision"] = (
            f"precision {held} instead of {chosen.precision}: the bundle's profile is {bundle.manifest.profile}"
        )
    if (longest := bundle.gradients.largest_tokens) < chosen.data.max_length:
        reasons["data.max_length"] = (
            f"rows of at most {longest} tokens instead of {chosen.data.max_length}: the bundle's graphs"
        )
    named = {"precision": held, "method": "qlora" if held in QUANTISED else "lora"}
    return Narrowed(chosen.model_copy(update=named), reasons | left_out(chosen))


def join(call: Call, node: Node, memory: Memory | None = None, *, aloud: bool = True) -> Offer:
    """Looks at plan, rows, bundle and battery, and says which adapter this device can train.

    Args:
        call: The coordinator's.
        node: This node's settings.
        memory: Where it is given, one real step on the longest rows shows whether the plan fits.
        aloud: Say what became of rows that are not used as they are.

    Raises:
        NotNowError: The battery is low.
        UserError: As ``choose``; or the rows cannot be used.
    """
    check_now(node, Senses())
    plan, bundle = choose(wish(call, node), node).chosen, opened(node)
    modules = bundle.modules(plan)
    found, encoding = gathered_rows(plan, node).prepared, Encoding(bundle, plan)
    for line in summary(found.report) if aloud else ():
        log.warning("%s: %s", node.name, line)  # what is less than was given is never silent
    training = encoding.examples(found.training, "training rows")
    encoding.examples(found.held_out, "held-out rows")
    if memory is not None:
        _tried(bundle, plan, training)
    head = {} if plan.head.local else {name: each.shape for name, each in bundle.gradients.start_dense().items()}
    return Offer(
        name=node.name,
        adapter=node.adapter or "",
        base_digest=bundle.manifest.base_digest,
        method=plan.method,
        precision=plan.precision,
        r=plan.lora.r,
        modules=modules,
        dense=head,
    )


def train(received: Received, node: Node, memory: Memory) -> Work:
    """Trains one round. Asked for the same round again, it gives the same update to the bit.

    Args:
        received: The coordinator's call and its adapter; this device trains the part of it that the call says.
        node: This node's settings.
        memory: Keeps what must not leave (``client.personal``).

    Raises:
        BaseMismatchError: The adapter is of another base than the bundle's.
        AdapterError: It does not fit the bundle's graphs.
        NotNowError: The battery is low, or became so; nothing is sent.
        DivergenceError: The loss is no number any more.
    """
    call, senses = received.call, Senses()
    check_now(node, senses)
    if node.state:
        private_folder(node.state)
    plan, bundle = at_asked_rank(received, choose(call.plan, node).chosen), _same_base(call, node)
    rows = gathered_rows(plan, node).prepared.training
    own = own_labels(rows, plan)
    encoding = Encoding(bundle, plan)
    examples = encoding.of_round(rows, call, plan)
    personal = Personal.of(call, frozenset(bundle.gradients.dense))
    kept = personal.before(memory, call.round)
    arrived, plan = personal.joined(received.adapter, kept), of_round(plan, call.round)
    bundle.check_adapter(arrived, plan)
    parts = divided(arrived, bundle.modules(plan), bundle.gradients.start_dense(), plan, fresh=call.fresh)
    asked = Round(plan, examples, call.trains, own, stretch(plan, call), lambda: why_not_now(node, senses), node.state)
    adapter, metrics = fit(_passes(bundle, plan, received, parts, node), parts.start, asked)
    personal.remember(memory, call.round, kept, adapter)
    shared = personal.shared(adapter if call.fresh else with_what_stayed(adapter, arrived, call.r))
    trained_on = len({id(example) for example in examples})  # a row that is drawn again is no other row
    manifest = Manifest(
        base_digest=bundle.manifest.base_digest,
        kind="update",
        method=plan.method,
        r=max(shared.ranks().values(), default=0),
        precision=plan.precision,
        federation=call.federation,
        round=call.round,
        parent=call.digest,
        num_examples=1 if call.privacy else min(trained_on, rows_taken(plan) or trained_on),
    )
    if node.device_own:
        _adapt_own(node, bundle, plan, encoding.examples(rows, "training rows"), _with_directions(arrived))
    told = {name: value for name, value in metrics.items() if name in _TOLD}
    return Work(Update(shared, manifest, trained_rows(shared, own, frozenset(shared.dense), plan)), told, metrics)


def evaluate(received: Received, node: Node, memory: Memory) -> tuple[dict[str, float], int]:
    """Measures the global adapter, with this node's own parts, on its held-out rows; returns metrics and how many rows.

    Figures have the names that ``strategies.evaluation.measure`` gives them. Of several tasks each has its own under ``TASK/``.
    """
    call = received.call
    plan, bundle = choose(call.plan, node).chosen, _same_base(call, node)
    found, encoding = gathered_rows(plan, node), Encoding(bundle, plan)
    personal = Personal.of(call, frozenset(bundle.gradients.dense))
    adapter = _with_directions(personal.joined(received.adapter, personal.before(memory, call.round + 1)))
    passes = Passes(
        bundle.gradients, _TASKS[plan.objective], plan.training.batch_size, beta=plan.dpo.beta, reference=received.reference
    )
    parts = {"": found.prepared.held_out, **{f"{name}/": rows for name, rows in found.tasks.items()}}
    told = {
        f"{of}{figure}": value
        for of, rows in parts.items()
        for figure, value in _figures(plan, passes, adapter, encoding.examples(rows, "held-out rows")).items()
    }
    return told, len(found.prepared.held_out)


def _with_directions(adapter: Adapter) -> Adapter:
    """Without modules of rank 0, which a round leaves that changed nothing there; graphs have none of them."""
    return Adapter({module: pair for module, pair in adapter.factors.items() if pair.r}, adapter.dense)


def _adapt_own(node: Node, bundle: Opened, plan: Plan, examples: Sequence[Example], beneath: Adapter) -> None:
    """What the device learns for itself is nobody's business: where it cannot, the round goes on without it."""
    try:
        device_own.adapt(node, bundle, plan, examples, beneath)
    except FedgeError as error:
        log.warning("%s: its own adapter stays as it was: %s", node.name, error)


def _figures(plan: Plan, passes: Passes, adapter: Adapter, examples: Sequence[Example]) -> dict[str, float]:
    if plan.objective == "dpo":
        margins = passes.margins(adapter, examples)
        won = float((margins > 0).mean())
        return {"loss": float(np.logaddexp(0, -margins).mean()), "reward-accuracy": won, "reward-margin": float(margins.mean())}
    scored = passes.scored(adapter, examples)
    loss = -float(scored.log_probabilities.sum()) / int(scored.tokens.sum())
    told = {"loss": loss, "accuracy": float((scored.hits == scored.tokens).mean())}
    return told if plan.objective == "classification" else {**told, "perplexity": math.exp(min(loss, _LARGEST_NATS))}


def _passes(bundle: Opened, plan: Plan, received: Received, parts: Parts, node: Node) -> Passes:
    """Over what is beneath the trained directions; near what the stage began from."""
    return Passes(
        bundle.gradients,
        _TASKS[plan.objective],
        plan.training.batch_size,
        beta=plan.dpo.beta,
        frozen=parts.frozen,
        reference=received.reference,
        kept=Aside(node.state),
    )


def _tried(bundle: Opened, plan: Plan, examples: Sequence[Example]) -> None:
    """One real step on the longest rows: what does not fit ends here, and not in the middle of a round."""
    longest = sorted(examples, key=lambda example: sum(len(row.ids) for row in example), reverse=True)
    parts = divided(Adapter(), bundle.modules(plan), bundle.gradients.start_dense(), plan, fresh=False)
    passes = Passes(bundle.gradients, _TASKS[plan.objective], plan.training.batch_size, beta=plan.dpo.beta)
    passes.gradient(parts.start, longest[: plan.training.batch_size], {})


def _same_base(call: Call, node: Node) -> Opened:
    bundle = opened(node)
    if call.manifest and call.manifest.base_digest != bundle.manifest.base_digest:
        raise BaseMismatchError(
            f"the federation trains base {call.manifest.base_digest[:12]}, the bundle is of {bundle.manifest.base_digest[:12]}"
        )
    return bundle
