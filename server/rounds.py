"""The round loop: draw a cohort, send each node its start, hold what comes back, merge it, keep it, measure it.

One update's way: the global adapter travels with a ``Call``; the node trains its part of it at its own rank and sends that
back as an ``Update``, which is read, held against what was asked (``server.admission``) and against the cohort
(``server.standing``), and added to the rule, which takes the start away again. Flower's own ``Strategy.start`` always begins
at round 1 and merges absolute arrays; this loop goes on where a coordinator died, and works on any ``Grid``.
"""

import hashlib
import logging
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median_high, median_low
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.serverapp import Grid

from protocol.adapter import Adapter, Array, Factors
from protocol.codec import pack, unpack
from protocol.enrolment import Enrolled
from protocol.errors import AdapterError, BudgetSpentError, ConfigurationError, DataError, FederationError
from protocol.federation import LOWER_IS_BETTER, Federation
from protocol.files import read_adapter
from protocol.manifest import Manifest
from protocol.product_space import at_rank
from protocol.records import Offer
from server.aggregation.registry import make
from server.audited import Audited
from server.evaluation_round import Measured, evaluate
from server.events import EventLog, finite
from server.ledger import ISSUED, Checkpoint, Kept, Ledger, RoundRecord, unsigned, vault_of
from server.membership import Membership
from server.private_round import PrivateRound
from server.publishing import Publisher
from server.secure_round import SecureRound
from server.signed_grid import SignedGrid
from server.standing import Standing
from server.story import read_story
from server.track import Track
from server.training_round import Trained, TrainingRound, described
from server.trust import Numbers, Trust

if TYPE_CHECKING:
    from server.spending import Spending

log = logging.getLogger("flwr")
Watch = Callable[[RoundRecord], None]
# Rules that set liars aside, and of how many updates at least one.
_FEWEST = {"agreement": 4, "trimmed-mean": 4, "krum": 5, "multi-krum": 5}


@dataclass(frozen=True)
class Outcome:
    """How a federation ended.

    Attributes:
        kept: The last round, by adapter; the only one of a federation without named adapters is under ``""``.
        offers: What each node offered, by node name.
        rounds: One record per round and adapter, of this process.
        left_out: Reason by node, for those that could not join.
        ended: Why there are no more rounds.
    """

    kept: Mapping[str, Kept]
    offers: Mapping[str, Offer]
    rounds: list[RoundRecord]
    left_out: Mapping[str, str] = field(default_factory=dict)
    ended: str = "every round is done"

    @property
    def adapter(self) -> Adapter:
        """The global adapter of a federation that has one."""
        return self._only().adapter

    @property
    def manifest(self) -> Manifest:
        """Its description."""
        return self._only().manifest

    def _only(self) -> Kept:
        if len(self.kept) != 1:
            raise FederationError(f"this federation has the adapters {', '.join(sorted(self.kept))}; say which")
        return next(iter(self.kept.values()))


def run(
    grid: Grid,
    federation: Federation,
    watch: Watch = lambda record: None,
    anew: Callable[[], None] = lambda: None,
    enrolled: Enrolled | None = None,
    trust: Trust | None = None,
) -> Outcome:
    """Runs a federation to its end; one that died in this output folder goes on where it was.

    Args:
        grid: Reaches the nodes.
        federation: What to publish.
        watch: Called after every round of every adapter.
        anew: Called before the first round, and not where a run goes on.
        enrolled: Public keys by node name for secure sums, where no other message is signed.
        trust: Who is who, in place of the files that the federation names.

    Raises:
        ConfigurationError: A secure sum without any of both and without such files, or files that hold something else.
        FederationError: Too few nodes joined, too few sent a usable update, a round cannot be kept, or the folder holds another
            run that has not ended.
        AdapterError: The adapter that the federation is to start from is damaged, or not for its base and plan.
    """
    with _alone_in(federation.output):
        return _Coordinator(grid, federation, watch, anew, enrolled, trust or Trust.of(federation.trust)).run()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two coordinators that write one folder would each undo the other's rounds. The lock goes with the process that has it."""
    try:
        import fcntl
    except ImportError:  # Windows has none of it
        yield
        return
    name = hashlib.sha256(str(folder.absolute()).encode(errors="surrogatepass")).hexdigest()[:16]
    with Path(tempfile.gettempdir(), f"fedge-{name}.lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FederationError(
                f"{folder}: another coordinator is running in it; wait for it, or name another folder"
            ) from None
        yield


class _Coordinator:
    def __init__(
        self,
        grid: Grid,
        federation: Federation,
        watch: Watch,
        anew: Callable[[], None],
        enrolled: Enrolled | None,
        trust: Trust | None,
    ) -> None:
        self._signed = trust and _signed(grid, federation, trust)
        self._grid = grid = self._signed or grid
        self._federation = federation
        self._watch = watch
        self._anew = anew
        self._events = EventLog(federation.output, tensorboard=federation.rounds.tensorboard)
        self._ledger = Ledger(
            federation.output,
            identity=federation.identity(),
            sign=self._signed.release if self._signed else unsigned,
            vault=vault_of(federation),
        )
        self._tracks: dict[str, Track] = {
            name: Track(name, name, plans, make(federation.aggregation)) for name, plans in federation.schedules().items()
        }
        self._audit = Audited(federation, trust)
        self._spending = _spending(federation)
        self._members = Membership(
            grid,
            federation,
            self._tracks,
            self._note_member,
            named=trust is not None,
            promise=lambda: self._spending.promise() if self._spending else None,
        )
        self._standing = Standing(federation.rounds)
        self._publisher = Publisher(federation.rounds.wire_down)
        if federation.secure_sum.enabled:
            known = trust.nodes if trust else enrolled
            if known is None:
                raise ConfigurationError(
                    "federation", ["trust.enrolled: missing; name the YAML file with everybody's name and public key"]
                )
            self._training: TrainingRound = SecureRound(
                grid, federation, self._publisher, self._standing, known, self._spending
            )
        elif self._spending:
            self._training = PrivateRound(grid, federation, self._publisher, self._standing, self._spending)
        else:
            self._training = TrainingRound(grid, federation, self._publisher, self._standing)
        self._number = 0
        self._traffic_bytes = 0
        self._seconds = 0.0
        self._kept: dict[str, Kept] = {}
        self._records: list[RoundRecord] = []

    def run(self) -> Outcome:
        self._ledger.check()
        found = self._ledger.newest()
        if found.another:
            raise FederationError(self._ledger.of_another(found.another, self._federation))
        for what in self._ledger.mend(found):
            self._events.note("damaged", found.checkpoint.round if found.checkpoint else 0, what=what)
        if found.checkpoint:
            self._audit.open(expect=found.checkpoint.state.get("audit"))
            self._restore(found.checkpoint)
        else:
            self._anew()
        if self._spending:
            self._spending.begin(self._number)
        self._members.gather()
        self._warn_of_few()
        if found.checkpoint:
            self._describe()
        last = max(len(track.plans) for track in self._tracks.values())
        ended = self._reason_to_stop()
        while not ended and self._number < last:
            self._number += 1
            try:
                self._round(last)
            except BudgetSpentError as error:
                self._number -= 1
                if not self._kept:
                    raise
                ended = str(error)
            else:
                ended = self._reason_to_stop()
        ended = ended or "every round is done"
        self._events.note("ended", self._number, reason=ended)
        self._events.close()
        self._audit.ended(self._number)
        self._ledger.end(self._number, ended)
        return Outcome(dict(self._kept), self._members.offers(), self._records, self._members.left_out, ended)

    # Beginning, and going on --------------------------------------------------------------------------------------------

    def _warn_of_few(self) -> None:
        rule, cohort = self._federation.aggregation.rule, self._federation.rounds.cohort
        for track in self._tracks.values():
            updates = min(len(track.members), cohort or len(track.members))
            if updates < (fewest := _FEWEST.get(rule, 0)):
                log.warning("%s sets nobody aside of fewer than %d updates, and a round has %d", rule, fewest, updates)

    def _restore(self, found: Checkpoint) -> None:
        state = found.state
        self._events.open()
        if not _is_noted(self._ledger.folder, found.round, state["happened"]):
            self._note(found.round, state["happened"])
        self._events.note("resumed", found.round)
        log.warning("going on after round %d in %s", found.round, self._ledger.folder)
        self._number, self._traffic_bytes, self._seconds = found.round, state["traffic_bytes"], state["seconds"]
        if self._signed:
            self._signed.run_name = state.get("run", self._signed.run_name)
        self._standing.restore(state["standing"])
        if self._spending:
            self._spending.restore(state["privacy"])
        self._publisher.restore(_part(found.arrays, "publisher"), state["publisher"])
        self._members.restore(state["members"])
        self._kept = dict(found.kept)
        plans = self._federation.schedules()
        self._tracks.clear()
        for name, about in state["tracks"].items():
            track = Track(about["root"], name, plans[about["root"]], make(self._federation.aggregation))
            track.belonging = set(about["belonging"])
            track.reference = Offer.model_validate(about["reference"]) if about["reference"] else None
            track.rule.restore(_part(found.arrays, f"rule {name}"))
            track.before = unpack(_part(found.arrays, f"before {name}"))
            if name in found.kept:
                track.adapter, track.manifest = found.kept[name].adapter, found.kept[name].manifest
            self._tracks[name] = track

    # One round ----------------------------------------------------------------------------------------------------------

    def _round(self, last: int) -> None:
        if self._signed:
            self._signed.begin(self._number)
        trained, connected = self._train()
        for name, done in trained.items():
            track = self._tracks[name]
            if done.adapter is not None and done.report is not None:
                track.manifest = described(  # before the adapter, which it names as its parent
                    track, self._number, self._members.base_digest, self._federation.name, done.adapter, done.report
                )
                track.adapter = done.adapter
                spent = done.privacy.get("epsilon") if done.privacy else None
                self._audit.released(self._number, name, track.adapter.digest(), spent)
        self._standing.note(
            self._number,
            accepted=[name for done in trained.values() for name in done.accepted],
            quarantined=[name for done in trained.values() for name in done.refused],
        )
        measured = self._evaluate(last, connected)
        records = {name: self._record(name, done, measured.get(name, Measured())) for name, done in trained.items()}
        self._keep(records, {name: done.split for name, done in trained.items() if done.split})
        for record in records.values():
            self._records.append(record)
            self._watch(record)

    def _train(self) -> tuple[dict[str, Trained], set[int]]:
        """One round, tried again while no track gets enough updates."""
        rounds = self._federation.rounds
        for attempt in range(rounds.retries + 1):
            if self._spending:
                self._spending.prepare(self._number)
            connected = self._members.refresh()
            self._draw_starts()
            for track in self._tracks.values():
                track.begin(self._number, given=bool(self._federation.start))
            self._audit.asked(self._number, attempt + 1, self._present(connected))
            trained = self._training.run(self._number, self._tracks, connected)
            for name, done in trained.items():
                self._audit.answered(self._number, name, done)
            if any(done.report for done in trained.values()):
                return trained, connected
            usable = max(len(done.accepted) for done in trained.values())
            reasons = "; ".join(
                f"{name}: {reason}"
                for done in trained.values()
                for name, reason in {**done.refused, **done.silent, **done.paused}.items()
            )
            reasons = "; ".join(filter(None, [*(done.given_up for done in trained.values()), reasons]))
            problem = f"round {self._number}: {usable} usable update(s), {rounds.minimum_nodes} are needed ({reasons})"
            self._events.note("no-quorum", self._number, attempt=attempt + 1, reason=problem)
            log.warning("%s", problem)
        raise FederationError(problem)

    def _present(self, connected: set[int]) -> list[str]:
        members = (member for track in self._tracks.values() for member in track.members.values())
        return sorted(member.name for member in members if member.node in connected)

    def _draw_starts(self) -> None:
        """Where a track begins that has merged nothing yet: at the federation's own start, or at what the rule draws for it."""
        for track in self._tracks.values():
            if not track.members or track.reference is None or track.manifest:
                continue
            if self._federation.start:
                track.adapter = _fitting(self._federation.start, track.reference, self._members.base_digest)
            else:
                ranks = tuple(member.offer.r for _, member in sorted(track.members.items()))
                track.adapter = track.rule.initial(track.reference.modules, ranks, self._federation.rounds.seed)

    def _evaluate(self, last: int, connected: set[int]) -> dict[str, Measured]:
        if self._spending and not self._spending.settings.evaluate:
            return {}
        every, final = self._federation.rounds.evaluate_every, self._number == last
        if not final and (not every or self._number % every):
            return {}
        return evaluate(self._grid, self._federation, self._publisher, self._tracks, self._number, connected)

    def _record(self, name: str, done: Trained, measured: Measured) -> RoundRecord:
        return RoundRecord(
            round=self._number,
            adapter=name,
            stage=self._federation.stage(self._number),
            accepted=done.accepted,
            refused=done.refused,
            silent=done.silent,
            paused=done.paused,
            dropped=done.dropped,
            evaluation=measured.metrics,
            evaluation_refused=measured.refused,
            norms=done.norms,
            merge=asdict(done.report) if done.report else {},
            privacy=done.privacy,
            bytes_sent=done.bytes_sent + measured.bytes_sent,
            bytes_received=done.bytes_received,
            seconds=done.seconds,
        )

    # Keeping ------------------------------------------------------------------------------------------------------------

    def _keep(self, records: Mapping[str, RoundRecord], splits: Mapping[str, tuple[frozenset[str], frozenset[str]]]) -> None:
        for name, record in records.items():
            track = self._tracks[name]
            self._traffic_bytes += record.bytes_sent + record.bytes_received
            if track.manifest:
                self._kept[name] = Kept(record, track.adapter, track.manifest, track.plan(self._number))
        self._seconds += max(record.seconds for record in records.values())
        happened = [finite({"event": "round", **_event(record)}) for record in records.values()]
        for name, parts in splits.items():
            happened += self._split(name, parts)
        arrays, state = self._state()
        # In the checkpoint too: a coordinator that dies before it has noted them does so when it goes on.
        self._ledger.keep(Checkpoint(self._number, self._kept, state | {"happened": happened}, arrays))
        if self._number == 1:  # a federation in which no round succeeds leaves nothing behind
            self._describe()
            self._events.open()
            self._audit.open()
        self._note(self._number, happened)
        for record in records.values():
            self._events.figures(self._number, _figures(record))

    def _note(self, number: int, happened: Iterable[Mapping[str, Any]]) -> None:
        for facts in happened:
            self._events.note(number=number, **facts)

    def _state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        published, about = self._publisher.state()
        arrays = {f"publisher {key}": array for key, array in published.items()}
        for name, track in self._tracks.items():
            arrays |= {f"rule {name} {key}": array for key, array in track.rule.state().items()}
            arrays |= {f"before {name} {key}": array for key, array in pack(track.before, "fp32").items()}
        state = {
            "audit": self._audit.last,
            "traffic_bytes": self._traffic_bytes,
            "seconds": self._seconds,
            "standing": self._standing.state(),
            "privacy": self._spending.state() if self._spending else {},
            "publisher": about,
            "members": self._members.state(),
            "tracks": {
                name: {
                    "root": track.root,
                    "belonging": sorted(track.belonging),
                    "reference": track.reference.model_dump(mode="json") if track.reference else None,
                }
                for name, track in self._tracks.items()
            },
        }
        return arrays, state | ({"run": self._signed.run_name} if self._signed else {})

    def _split(self, name: str, parts: tuple[frozenset[str], frozenset[str]]) -> list[dict[str, Any]]:
        """Puts two tracks in the place of one; what happened, as events.

        Whoever was not heard in this round has shown no side and goes with the larger part, as newcomers do; if that is the
        wrong one, its updates will say so, and the part splits again.
        """
        whole, kept = self._tracks.pop(name), self._kept.pop(name)
        unheard = (whole.members.keys() | whole.belonging) - parts[0] - parts[1]
        larger = max(parts, key=len)
        happened = []
        for number, heard in enumerate(parts, 1):
            names = heard | unheard if heard is larger else heard
            part = Track(whole.root, f"{name}/part-{number}".lstrip("/"), whole.plans, make(self._federation.aggregation))
            part.rule.restore(whole.rule.state())
            part.adapter, part.manifest, part.before = whole.adapter, whole.manifest, whole.before
            part.reference, part.belonging = whole.reference, set(names)
            part.members = {member: about for member, about in whole.members.items() if member in names}
            self._tracks[part.name] = part
            self._kept[part.name] = replace(kept, record=replace(kept.record, adapter=part.name))
            happened.append({"event": "split", "adapter": part.name, "members": sorted(names)})
        return happened

    def _describe(self) -> None:
        facts = {"federation": self._federation.model_dump(mode="json"), "left_out": self._members.left_out}
        offered = {name: offer.model_dump(mode="json") for name, offer in self._members.offers().items()}
        self._ledger.describe(facts | {"offers": offered})

    # Ending -------------------------------------------------------------------------------------------------------------

    def _reason_to_stop(self) -> str:
        stop = self._federation.stop
        if stop.traffic_bytes and self._traffic_bytes >= stop.traffic_bytes:
            return f"{self._traffic_bytes} adapter bytes were sent and received, the budget is {stop.traffic_bytes}"
        if stop.seconds and self._seconds >= stop.seconds:
            return f"the rounds took {self._seconds:.0f} s, the budget is {stop.seconds:g} s"
        if stop.metric and stop.target is not None and (found := self._reached(stop.metric)) is not None:
            reached = found <= stop.target if stop.metric in LOWER_IS_BETTER else found >= stop.target
            if reached:
                return f"{stop.metric} is {found:.6g} or better at more than half of the nodes, the target is {stop.target:g}"
        return ""

    def _reached(self, metric: str) -> float | None:
        """What more than half of the nodes that measured after the newest round have reached; None where nobody did."""
        newest = [kept.record for kept in self._kept.values() if kept.record.round == self._number]
        values = [metrics[metric] for record in newest for metrics in record.evaluation.values() if metric in metrics]
        if not values:
            return None
        return median_high(values) if metric in LOWER_IS_BETTER else median_low(values)

    def _note_member(self, event: str, **facts: Any) -> None:
        self._events.note(event, self._number, **facts)
        self._audit.member(event, facts)


def _spending(federation: Federation) -> "Spending | None":
    """The privacy budget; what accounts for it is loaded where there is one."""
    if not federation.privacy.enabled:
        return None
    from server.spending import Spending

    return Spending(federation)


def _signed(grid: Grid, federation: Federation, trust: Trust) -> SignedGrid:
    """A grid for a new run; one that goes on takes the name that it has."""
    numbers = Numbers(federation.output / ISSUED)
    return SignedGrid(grid, trust, numbers, federation.name, secrets.token_hex(16))


def _fitting(folder: Path, reference: Offer, base_digest: str) -> Adapter:
    """An adapter on disk that nodes with such an offer can go on from."""
    adapter, _ = read_adapter(folder, base_digest=base_digest)
    found = {module: pair.shape for module, pair in adapter.factors.items()}
    found |= {name: tensor.shape for name, tensor in adapter.dense.items()}
    known = {**reference.modules, **reference.dense}
    if wrong := sorted(name for name, shape in found.items() if known.get(name) != shape):
        raise AdapterError(
            f"{folder}: {wrong[0]} has shape {found[wrong[0]]}, the federation's plan trains "
            f"{known.get(wrong[0], 'nothing of that name')}; start from an adapter of the same base, method and targets"
        )
    # Nodes of smaller rank train the leading directions, so these must come first, whoever wrote the adapter.
    return Adapter({module: _ordered(pair) for module, pair in adapter.factors.items()}, adapter.dense)


def _ordered(pair: Factors) -> Factors:
    best = at_rank(pair, pair.r)
    return Factors(best.A.astype(np.float32), best.B.astype(np.float32))


def _is_noted(folder: Path, number: int, happened: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the log tells of a round; one that is missing or damaged tells of none."""
    try:
        noted = {event.adapter for event in read_story(folder).rounds if event.round == number}
    except DataError:
        return False
    return noted >= {facts["adapter"] for facts in happened if facts["event"] == "round"}


def _part(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    start = f"{prefix} "
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def _event(record: RoundRecord) -> dict[str, Any]:
    """What ``events.jsonl`` says of a round; the whole of it is in ``round.json``."""
    return {
        "adapter": record.adapter,
        "stage": record.stage,
        "accepted": sorted(record.accepted),
        "refused": dict(record.refused),
        "silent": dict(record.silent),
        "paused": dict(record.paused),
        "dropped": list(record.dropped),
        "evaluation": {name: dict(metrics) for name, metrics in record.evaluation.items()},
        "evaluation_refused": dict(record.evaluation_refused),
        "merge": {key: value for key, value in record.merge.items() if key != "details"},
        "privacy": dict(record.privacy),
        "bytes_sent": record.bytes_sent,
        "bytes_received": record.bytes_received,
        "seconds": round(record.seconds, 3),
    }


def _figures(record: RoundRecord) -> dict[str, float]:
    """Every number of a round under a name of its own."""
    at = f"{record.adapter}/" if record.adapter else ""
    found: dict[str, float] = {f"{at}traffic/sent": record.bytes_sent, f"{at}traffic/received": record.bytes_received}
    found |= {f"{at}privacy/{key}": value for key, value in record.privacy.items()}
    found |= {f"{at}merge/{key}": value for key, value in record.merge.items() if isinstance(value, int | float)}
    for kind, nodes in (("training", record.accepted), ("evaluation", record.evaluation)):
        found |= {f"{at}{kind}/{node}/{key}": value for node, metrics in nodes.items() for key, value in metrics.items()}
    return found
