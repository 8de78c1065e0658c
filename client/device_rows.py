"""A device's own rows: read, cleaned, masked and held out as at every node, then token ids by the bundle's tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any

from client.device_bundle import Opened
from client.node import Node
from client.round_plan import counts_steps, rows_from, rows_taken
from edge.runtime.adapting.passes import Example
from edge.runtime.adapting.rows import RowReader
from protocol.errors import DataError
from protocol.plan import Plan
from protocol.records import Call
from strategies.data.formats import Conversation, LabelledText, PlainText, Preference, Row
from strategies.data.mixture import Gathered, gathered


def gathered_rows(plan: Plan, node: Node) -> Gathered:
    """Rows that train and rows that are held out, of all tasks and what is replayed beside them.

    Raises:
        DataError: A file cannot be read, or its rows cannot be used.
    """
    return gathered(node.treating(plan), node.sources(), node.replay, rows_taken(plan))


class Encoding:
    """Token ids of rows, each made once.

    Args:
        bundle: Whose tokenizer and template.
        plan: Says how many tokens, and which labels.
    """

    def __init__(self, bundle: Opened, plan: Plan) -> None:
        self.most_tokens = min(plan.data.max_length, bundle.gradients.largest_tokens)
        self._labels = plan.data.labels or ()
        self._reader = RowReader(bundle.manifest, bundle.tokens, self.most_tokens, self._labels)
        self._known: dict[int, tuple[Row, Example]] = {}  # the row, so that nothing else gets its id

    def example(self, row: Row) -> Example:
        """One row, or two of a pair; empty where nothing is left to learn.

        Raises:
            DataError: It is none that a device learns from.
        """
        if id(row) not in self._known:
            self._known[id(row)] = row, self._reader.example(_record(row, self._labels))[1]
        return self._known[id(row)][1]

    def examples(self, rows: Sequence[Row], named: str) -> list[Example]:
        """All rows that leave something to learn.

        Raises:
            DataError: None does.
        """
        found = [example for row in rows if (example := self.example(row))]
        if not found:
            raise DataError(f"{named}: none of {len(rows)} rows leaves anything to learn within {self.most_tokens} tokens")
        return found

    def of_round(self, rows: Sequence[Row], call: Call, plan: Plan) -> list[Example]:
        """The round's rows: all, or as many usable ones as its steps take."""
        if not counts_steps(plan, call):
            return self.examples(rows, f"round {call.round}")
        return [self.example(row) for row in rows_from(rows, call, plan, rows_taken(plan), lambda row: bool(self.example(row)))]


def _record(row: Row, labels: Sequence[str]) -> Mapping[str, Any]:
    match row:
        case Conversation(prompt, answer, None, "assistant"):
            return {"prompt": prompt, "answer": answer}
        case Preference(prompt, chosen, rejected):
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        case LabelledText(text, label):
            return {"text": text, "label": labels[label]}
        case PlainText(text):
            return {"text": text}
    raise DataError("a row calls tools or answers in another role than the assistant's; a device learns from neither")
