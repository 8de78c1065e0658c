"""A federation's folder as a person asks about it: where it stands, its nodes, its rounds. Read from its event log."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from server.events import Event, read_events


@dataclass
class Story:
    """What the events add up to; a round that was done again after a crash counts once, as it was done last.

    Attributes:
        name: The folder.
        nodes: Facts by node name: adapter, method, r, how many rounds merged it, why it was refused last.
        left_out: Reason by node, of those that could not join.
        rounds: One event per round and adapter, in order.
        evaluation: Metrics by node, of the newest round that was measured.
        last: When the newest event was, in seconds since 1970.
        ended: Why there are no more rounds; empty while there are.
        troubles: Damaged checkpoints, rounds without quorum, splits: one line each.
    """

    name: str
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    rounds: list[Event] = field(default_factory=list)
    evaluation: dict[str, Mapping[str, float]] = field(default_factory=dict)
    ended: str = ""
    last: float = 0.0
    troubles: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """The whole in one mapping, for ``--json`` and the head of the status."""
        newest = self.rounds[-1] if self.rounds else Event(event="round")
        seconds: dict[int, float] = {}
        for event in self.rounds:  # several adapters share a round's time
            seconds[event.round] = max(event.seconds, seconds.get(event.round, 0.0))
        return {
            "state": self.ended or f"running, or died; the last event was {max(0, round(time.time() - self.last)):,} s ago",
            "round": newest.round,
            "stage": newest.stage,
            "nodes": len(self.nodes),
            **self._privacy(newest),
            "bytes_sent": sum(event.bytes_sent for event in self.rounds),
            "bytes_received": sum(event.bytes_received for event in self.rounds),
            "seconds": round(sum(seconds.values()), 3),
            "left_out": self.left_out,
            "refused": {name: about["refused"] for name, about in self.nodes.items() if about.get("refused")},
            "evaluation": {name: dict(metrics) for name, metrics in self.evaluation.items()},
            "troubles": self.troubles,
        }

    def _privacy(self, newest: Event) -> dict[str, Any]:
        """What the privacy budget was and what of it is spent, where there is one."""
        if not newest.privacy:
            return {}
        told = newest.privacy
        return {
            "epsilon": round(told.get("epsilon", 0.0), 4),
            "epsilon_budget": told.get("budget", 0.0),
            "delta": told.get("delta", 0.0),
        }

    def metrics(self) -> list[str]:
        """Names of what nodes measured in any round."""
        found = {m for event in self.rounds for metrics in event.evaluation.values() for m in metrics}
        return sorted(found - {"num-examples"})


def middle(event: Event, metric: str) -> float | None:
    """Median over the nodes that measured in a round: what one of them says may be anything."""
    values = [metrics[metric] for metrics in event.evaluation.values() if metric in metrics]
    return median(values) if values else None


def read_story(folder: Path) -> Story:
    """Reads ``FOLDER/events.jsonl``.

    Raises:
        DataError: There is none, or it is damaged.
    """
    story = Story(str(folder))
    rounds: dict[tuple[int, str], Event] = {}
    for event in read_events(folder):
        story.last = event.time
        if event.event == "joined":
            facts = {"adapter": event.adapter, "method": event.method, "precision": event.precision, "r": event.r}
            story.nodes.setdefault(event.node, {}).update(facts)
            story.left_out.pop(event.node, None)
        elif event.event == "left-out":
            story.left_out[event.node] = event.reason
        elif event.event == "round":
            rounds[event.round, event.adapter] = event
        elif event.event == "resumed":  # rounds after the one that it went on from are done again
            rounds = {key: value for key, value in rounds.items() if key[0] <= event.round}
            story.ended = ""
        elif event.event == "ended":
            story.ended = event.reason
        elif event.event in ("damaged", "no-quorum", "split"):
            said = event.what or event.reason or ", ".join(event.members)
            story.troubles.append(f"round {event.round}: {event.event}: {said}")
    story.troubles = list(dict.fromkeys(story.troubles))  # a split that was noted again after a crash was one
    story.rounds = [event for _, event in sorted(rounds.items())]
    for event in story.rounds:
        for name in event.accepted:
            about = story.nodes.setdefault(name, {})
            about["accepted"] = about.get("accepted", 0) + 1
        for name, reason in event.refused.items():
            story.nodes.setdefault(name, {})["refused"] = f"round {event.round}: {reason}"
        story.evaluation.update(event.evaluation)
    return story
