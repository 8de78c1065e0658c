"""Every round on disk: the global adapter, who took part and what was measured. A round is there whole or not at all."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from protocol.adapter import Adapter
from protocol.files import save_adapter, whole_folder, write_whole
from protocol.manifest import Manifest


@dataclass(frozen=True)
class RoundRecord:
    """One round as the coordinator saw it.

    Attributes:
        round: From 1; 0 is before any training.
        accepted: Metrics by node name, of the updates that were merged.
        refused: Reason by node name.
        evaluation: Metrics by node name, measured by the nodes on their held-out rows with the new global adapter.
        evaluation_refused: Reason by node name, of those that could not measure.
        merge: What the aggregation reported.
        bytes_sent, bytes_received: Adapter tensors only.
        seconds: From the first message to the merged adapter.
    """

    round: int
    accepted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    evaluation_refused: Mapping[str, str] = field(default_factory=dict)
    merge: Mapping[str, float] = field(default_factory=dict)
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0


class Ledger:
    """The folder of one federation.

    ``rounds/0001/`` holds a PEFT adapter, its manifest and ``round.json``; ``adapter/`` is a copy of the newest.

    Args:
        folder: Created when the first round is kept.
        base_model: Name written into ``adapter_config.json``.
        task_type: PEFT's name of the task.
    """

    def __init__(self, folder: Path, *, base_model: str, task_type: str) -> None:
        self.folder = folder
        self._names = {"base_model": base_model, "task_type": task_type}

    def keep(self, record: RoundRecord, adapter: Adapter, manifest: Manifest) -> Path:
        """Writes one round; returns its folder."""
        rounds = self.folder / "rounds"
        if record.round == 1 and rounds.exists():  # an earlier run's: its rounds must not mix with these
            rounds.rename(_free(self.folder / "rounds-before"))
        target = rounds / f"{record.round:04d}"
        for place in (target, self.folder / "adapter"):
            with whole_folder(place) as draft:
                save_adapter(draft, adapter, manifest, **self._names)
                text = json.dumps(_finite(asdict(record)), indent=2, allow_nan=False)
                (draft / "round.json").write_text(text, encoding="utf-8")
        return target

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Writes ``federation.json``: what was published and what each node offered."""
        write_whole(self.folder / "federation.json", json.dumps(facts, indent=2, default=str))


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _free(path: Path) -> Path:
    number = 1
    while (found := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return found
