"""A Grid over simulated time: devices come and go with their spells, and replies come in the order in which they would.

What a question takes is known when it is sent: its bytes and those of an update over the device's network, the rows over its
speed. So replies can be handed over in their order while only those that are pulled are computed: of too many that are asked
the coordinator takes the first, and nobody trains for the others. A device whose spell ends before its reply is there shows as
on a SuperLink: as an error in its place, once its heartbeat is missed. Joining takes no time.

A run that died goes on from its journal (``simulations.device_journal``).
"""

import heapq
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from numpy.typing import NDArray

from client.device_bytes import DeviceBytes, clock, message_bytes, update_bytes
from protocol.errors import FederationError, NotNowError
from protocol.federation import RoundSettings
from protocol.files import private_folder
from protocol.records import Call, read_asked
from simulations.availability import DAY_SECONDS
from simulations.device_journal import DROPPED, GONE, LATE, REPLIED, Heard, Journal, Question
from simulations.devices import Fleet
from simulations.grid import InProcessGrid

LOG = "devices.log"
_NOTICED_SECONDS = 60.0  # a heartbeat every 30 s, of which two may fail
_LOOK_SECONDS, _LONGEST_WAIT = 600, 2 * DAY_SECONDS


@dataclass(frozen=True)
class DeviceRound:
    """What a round was to the devices.

    Attributes:
        round: From 1.
        available: Devices in a spell when it began.
        asked: To train.
        replied, gone, late, dropped: How many of them (``Question.end``).
        refused: How many refused because their bytes are spent.
        failed: How many refused with another code.
        bytes_down, bytes_up: Of training and measuring, all devices.
        hours: Simulated time since the run began, at its end.
    """

    round: int
    available: int
    asked: int
    replied: int
    gone: int
    late: int
    dropped: int
    refused: int
    failed: int
    bytes_down: int
    bytes_up: int
    hours: float


@dataclass(frozen=True)
class DeviceTotals:
    """What devices have spent in all rounds; mean and median are over those that were asked.

    Attributes:
        devices, asked: How many there are, and how many were asked at least once.
        total, mean, median, most: Bytes both ways.
        refused: How many refused at least once because their bytes are spent.
        hours: Simulated.
    """

    devices: int
    asked: int
    total: int
    mean: float
    median: float
    most: int
    refused: int
    hours: float


class DeviceGrid(InProcessGrid):
    """Reaches the devices of a fleet.

    Args:
        client_app: What each would start.
        fleet: The devices; node ids count from 1 in their order.
        rounds: How many are asked, and how long they are waited for.
        folder: Keeps the journal, and in ``devices.log`` what devices tell of themselves.
    """

    def __init__(self, client_app: ClientApp, fleet: Fleet, rounds: RoundSettings, folder: Path) -> None:
        super().__init__(client_app, ())
        self._fleet, self._rounds, self._folder = fleet, rounds, folder
        self._journal = Journal(folder, len(fleet))
        self._limited = fleet.settings.device_bytes is not None
        self.now = 0.0
        self._phase, self._of, self._had_a_round = 0, (0, ""), False
        self._questions: dict[str, Question] = {}
        self._order: list[tuple[float, int, str]] = []
        self._ended: list[Question] = []
        self._available = 0
        self._busy, self._away = np.zeros((2, len(fleet)))
        self._spent, self._refused = np.zeros(len(fleet), np.int64), np.zeros(len(fleet), bool)

    # Going on -----------------------------------------------------------------------------------------------------------

    def go_on(self, number: int) -> None:
        """Puts the devices back to where they were after a round, as the journal tells it.

        Raises:
            FederationError: It does not tell of that round.
        """
        kept = self._journal.cut(number)
        if self._limited:  # what the round that died has counted is counted once
            for folder in sorted(each for each in self._folder.iterdir() if each.is_dir()):
                DeviceBytes(self._fleet.node(int(folder.name) - 1), RecordDict()).forget()
        for line in kept:
            if isinstance(line, Question):
                if line.phase != self._phase:
                    self._settle()
                self._phase, self.now, self._had_a_round = line.phase, line.sent, True
                self._questions[str(line.device)] = line
            else:
                self._again(self._questions.pop(str(line.device)), line)
        self._settle()

    def _again(self, question: Question, heard: Heard) -> None:
        """What was heard before the run died."""
        self.now = question.told
        if question.end != REPLIED:
            self._end(self._unseen(question))
            return
        question = replace(question, end=heard.end, up=heard.up)
        if self._limited:
            with self._at_home(question.device, question.told):
                DeviceBytes(self._fleet.node(question.device), RecordDict()).count(question.down + question.up)
        self._end(question)

    # Messages -----------------------------------------------------------------------------------------------------------

    def get_node_ids(self) -> list[int]:
        """Who is available, at a moment when as many are as a round asks.

        Raises:
            FederationError: Not even the smallest number of updates that a round needs comes together within two days.
        """
        self._settle()
        if self._had_a_round:
            self.now, self._had_a_round = self.now + self._fleet.settings.pause_seconds, False
        there = self._wait()
        self._available = len(there)
        return there

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Sends messages; each but those that ask to join takes its time from now on."""
        messages, calls = list(messages), dict[int, tuple[Call, int]]()
        ids = super().push_messages(messages)
        for message_id, message in zip(ids, messages, strict=True):
            if message.metadata.message_type == MessageType.QUERY:
                continue
            content = message.content
            if id(content) not in calls:  # those that are sent the same are sent one object
                calls[id(content)] = read_asked(content), message_bytes(content)
            self._send(message_id, message, *calls[id(content)])
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The reply to one of these messages: of those that take time only to the one that comes first of all."""
        for message_id in message_ids:
            if message_id in self._questions and self._order[0][-1] == message_id:
                return [self._hear(message_id)]
            if message_id not in self._questions and (found := super().pull_messages([message_id])):
                return found
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:  # noqa: ARG002
        """Replies in their order."""
        left = self.push_messages(messages)
        while left:
            left = [message_id for message_id in left if message_id in self._waiting]
            for message_id in left:
                yield from self.pull_messages([message_id])

    def answer(self, message: Message) -> Message:
        """What a device replies, computed now."""
        device = message.metadata.dst_node_id - 1
        with self._fleet.asked(device) as context, self._at_home(device, self.now):
            return self._app(message, context)

    # Time ---------------------------------------------------------------------------------------------------------------

    def _send(self, message_id: str, message: Message, call: Call, down: int) -> None:
        kind, device = message.metadata.message_type, message.metadata.dst_node_id - 1
        if self._of != (call.round, kind):
            self._settle()
            self._of = (call.round, kind)
        fleet, self._had_a_round = self._fleet, True
        training = kind == MessageType.TRAIN
        up = update_bytes(call, fleet.node(device)) if training else 0
        rows = fleet.rows_of(device, call.plan) if training else fleet.held_out_of(device, call.plan)
        begun = max(self.now, float(self._busy[device]))
        at = begun + (down + up) / float(fleet.bytes_per_second[device]) + rows / float(fleet.rows_per_second[device])
        gone = fleet.availability.until(device, self.now)
        told, end = (at, REPLIED) if at <= gone else (gone + _NOTICED_SECONDS, GONE)
        if told > (deadline := self.now + self._rounds.timeout_seconds):
            told, end = deadline, (LATE if at <= gone else GONE)
        question = Question(
            phase=self._phase,
            round=call.round,
            kind=kind,
            device=device,
            sent=self.now,
            at=min(at, gone),
            told=told,
            down=down,
            up=up if at <= gone else 0,
            end=end,
        )
        self._questions[message_id] = question
        heapq.heappush(self._order, (told, device, message_id))
        self._journal.note(question)

    def _hear(self, message_id: str) -> Message:
        heapq.heappop(self._order)
        question, message = self._questions.pop(message_id), self._waiting.pop(message_id)
        self.now = question.told
        if question.end == REPLIED:
            reply = self.answer(message)
            if reply.has_error():
                question = replace(question, end=str(reply.error.reason), up=0)
            else:
                question = replace(question, up=message_bytes(reply.content))
        else:
            waited = f"no reply within {self._rounds.timeout_seconds:g} s"
            error = Error(ErrorCode.NODE_UNAVAILABLE, "the device has gone" if question.end == GONE else waited)
            reply, question = Message(error, reply_to=message), self._unseen(question)
        self._journal.note(Heard(question.round, question.device, question.end, question.up))
        self._end(question)
        return reply

    def _settle(self) -> None:
        """Nobody waits any more for what is not heard yet: devices go on with it, for nothing."""
        for message_id, question in self._questions.items():
            self._waiting.pop(message_id, None)
            told = question if question.end == GONE else replace(question, end=DROPPED)
            self._end(self._unseen(told))
        self._questions.clear()
        self._order.clear()
        self._phase += 1

    def _end(self, question: Question) -> None:
        device = question.device
        self._busy[device] = max(self._busy[device], question.at)
        self._spent[device] += question.down + question.up
        if question.end == NotNowError.code:  # it has no battery, so that its bytes are spent
            self._stay_away(question)
        self._ended.append(question)

    def _stay_away(self, question: Question) -> None:
        """A device without bytes does not come back for a day."""
        self._refused[question.device], self._away[question.device] = True, question.told + DAY_SECONDS

    def _unseen(self, question: Question) -> Question:
        """A question that no device was run for, with what it costs its device: no update for which no bytes are left."""
        if self._limited:
            own = DeviceBytes(self._fleet.node(question.device), RecordDict())
            with self._at_home(question.device, question.told):
                own.count(question.down)
                try:
                    own.check(question.up)
                except NotNowError:
                    self._stay_away(question)
                    return replace(question, up=0)
                own.count(question.up)
        return question

    def _wait(self) -> list[int]:
        fewest, rounds = self._rounds.minimum_nodes, self._rounds
        wanted = round(rounds.cohort * (1 + rounds.over_selection)) if rounds.cohort else fewest
        most, when = -1, self.now
        for step in range(0, _LONGEST_WAIT + 1, _LOOK_SECONDS):
            found = int(self._present(self.now + step).sum())
            if found > most:
                most, when = found, self.now + step
            if found >= wanted:
                break
        if most < fewest:
            raise FederationError(
                f"at most {most} of {len(self._fleet)} devices are available at once within two days, and {fewest} are needed; "
                "lower rounds.minimum_nodes, or give devices longer spells or more bytes"
            )
        self.now = when
        return [int(device) + 1 for device in np.flatnonzero(self._present(when))]

    def _present(self, when: float) -> NDArray[np.bool_]:
        present: NDArray[np.bool_] = self._fleet.availability.at(when) & (self._away <= when)
        return present

    # Telling ------------------------------------------------------------------------------------------------------------

    def report(self, number: int) -> DeviceRound:
        """What round ``number``, the newest, was to the devices."""
        self._settle()
        self._ended = [question for question in self._ended if question.round == number]
        asked = [question.end for question in self._ended if question.kind == MessageType.TRAIN]
        named = {end: asked.count(end) for end in (REPLIED, GONE, LATE, DROPPED)}
        refused = asked.count(NotNowError.code)
        return DeviceRound(
            round=number,
            available=self._available,
            asked=len(asked),
            refused=refused,
            failed=len(asked) - refused - sum(named.values()),
            bytes_down=sum(question.down for question in self._ended),
            bytes_up=sum(question.up for question in self._ended),
            hours=self.now / 3600,
            **named,
        )

    def totals(self) -> DeviceTotals:
        """What all rounds were to the devices."""
        spent = self._spent[self._spent > 0]
        return DeviceTotals(
            devices=len(self._fleet),
            asked=len(spent),
            total=int(spent.sum()),
            mean=float(spent.mean()) if len(spent) else 0.0,
            median=float(np.median(spent)) if len(spent) else 0.0,
            most=int(spent.max(initial=0)),
            refused=int(self._refused.sum()),
            hours=self.now / 3600,
        )

    @contextmanager
    def _at_home(self, device: int, when: float) -> Iterator[None]:
        """For a device's own code: its clock, and a log of its own, for thousands would drown what the coordinator says."""
        private_folder(self._folder)
        log, name = logging.getLogger("flwr"), self._fleet.node(device).name
        handler = logging.FileHandler(self._folder / LOG, encoding="utf-8", delay=True)
        handler.setFormatter(logging.Formatter(f"{when:.0f} s  {name}  %(levelname)s  %(message)s"))
        handlers, propagates, time = log.handlers[:], log.propagate, clock.set(lambda: when)
        log.handlers[:], log.propagate = [handler], False
        try:
            yield
        finally:
            clock.reset(time)
            log.handlers[:], log.propagate = handlers, propagates
            handler.close()
