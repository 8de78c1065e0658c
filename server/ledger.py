"""Every round on disk: the global adapters, who took part, what was measured and all that a coordinator must know to go on.

``rounds/0001/`` appears whole or not at all, with a checksum of every file. A coordinator that died goes on after the newest
round whose checksums hold.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from protocol.adapter import Adapter, Array, Factors
from protocol.errors import AdapterError, FederationError
from protocol.files import CONFIG, MANIFEST, WEIGHTS, read_adapter, save_adapter, whole_folder, write_whole
from protocol.manifest import Manifest

log = logging.getLogger("flwr")
ROUND, STATE, ARRAYS, CHECKSUMS = "round.json", "state.json", "state.safetensors", "checksums.json"
DESCRIPTION, ENDED, ROUNDS, DAMAGED = "federation.json", "ended.json", "rounds", "damaged"


@dataclass(frozen=True)
class RoundRecord:
    """One round of one adapter as the coordinator saw it.

    Attributes:
        round: From 1; 0 is before any training.
        adapter: Which of the federation's adapters; empty where there is but one.
        accepted: Metrics by node name, of the updates that were merged.
        refused: Reason by node name, of the updates that were quarantined.
        silent: Reason by node name, of the nodes that sent nothing that could be read in time.
        paused: Reason by node name, of the nodes that were not asked.
        evaluation: Metrics by node name, measured by the nodes on their held-out rows with the new global adapter.
        evaluation_refused: Reason by node name, of those that could not measure.
        norms: Size of each accepted update's change, in product space.
        merge: What the aggregation reported.
        bytes_sent, bytes_received: Of adapters, as packed on the wire.
        seconds: From the first message to the merged adapter.
    """

    round: int
    adapter: str = ""
    accepted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    silent: Mapping[str, str] = field(default_factory=dict)
    paused: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    evaluation_refused: Mapping[str, str] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)
    merge: Mapping[str, Any] = field(default_factory=dict)
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Kept:
    """One adapter after a round.

    Attributes:
        record: The round.
        adapter, manifest: What it made.
        base_model, task_type: Names for ``adapter_config.json``.
    """

    record: RoundRecord
    adapter: Adapter
    manifest: Manifest
    base_model: str = ""
    task_type: str = "CAUSAL_LM"


@dataclass(frozen=True)
class Checkpoint:
    """All that is known after a round.

    Attributes:
        round: Which.
        kept: One per adapter, by its name.
        state: What the rest of the coordinator must remember, as JSON.
        arrays: The same, as arrays.
        damaged: What was found damaged on the way to this round, and moved aside.
    """

    round: int
    kept: Mapping[str, Kept]
    state: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)
    damaged: Sequence[str] = ()


class Ledger:
    """The folder of one federation.

    ``rounds/0001/`` holds a PEFT adapter, its manifest and ``round.json``, and the coordinator's state; ``adapter/`` is a copy
    of the newest adapter. Where there are several adapters they lie in ``rounds/0001/adapters/NAME/`` and ``adapters/NAME/``.

    Args:
        folder: Created when the first round is kept.
        identity: What makes this federation the same as one that began here earlier; rounds of another are moved aside.
    """

    def __init__(self, folder: Path, *, identity: str) -> None:
        self.folder = folder
        self._identity = identity

    def keep(self, checkpoint: Checkpoint) -> Path:
        """Writes one round; returns its folder.

        Raises:
            FederationError: The disk does not take it; every earlier round is as it was.
        """
        if checkpoint.round == 1:
            self._move_aside()
        target = self.folder / ROUNDS / f"{checkpoint.round:04d}"
        try:
            with whole_folder(target) as draft:
                for name, kept in checkpoint.kept.items():
                    _save(place_of(draft, name, single=""), kept)
                state = {"round": checkpoint.round, "adapters": sorted(checkpoint.kept), "state": checkpoint.state}
                (draft / STATE).write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
                (draft / ARRAYS).write_bytes(save({name: np.asarray(a, order="C") for name, a in checkpoint.arrays.items()}))
                _seal(draft)
            self._copy_newest(target, checkpoint.kept)
        except OSError as error:
            last = f"the last good one is {checkpoint.round - 1}" if checkpoint.round > 1 else "there is none before it"
            raise FederationError(
                f"round {checkpoint.round} cannot be kept in {self.folder} ({error.strerror or type(error).__name__}); {last}; "
                "make room, then start the same federation again: it goes on from there"
            ) from None
        return target

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Writes ``federation.json``: what was published and what each node offered."""
        write_whole(self.folder / DESCRIPTION, json.dumps({"identity": self._identity, **facts}, indent=2, default=str))

    def end(self, number: int, reason: str) -> None:
        """Marks the run as ended: the same federation, started again, begins anew."""
        write_whole(self.folder / ENDED, json.dumps({"round": number, "reason": reason}))

    def newest(self) -> Checkpoint | None:
        """The last good round of a run of this federation that has not ended; None where there is nothing to go on from.

        A round whose checksums do not hold is moved to ``damaged/`` and named in ``Checkpoint.damaged``.
        """
        if not self._is_ours() or (self.folder / ENDED).exists():
            return None
        damaged: list[str] = []
        for folder in sorted((self.folder / ROUNDS).glob("[0-9]*"), reverse=True):
            try:
                _check_seal(folder)
                found = self._read(folder, damaged)
            except (AdapterError, OSError, ValueError, KeyError) as error:
                aside = _free(self.folder / DAMAGED / folder.name)
                aside.parent.mkdir(exist_ok=True)
                folder.rename(aside)
                damaged.append(f"round {int(folder.name)} is damaged ({error}); it was moved to {aside}")
                log.warning("%s", damaged[-1])
                continue
            self._copy_newest(folder, found.kept)  # it may have died between keeping the round and copying it
            return found
        return None

    def _is_ours(self) -> bool:
        try:
            found = json.loads((self.folder / DESCRIPTION).read_text(encoding="utf-8"))
            return bool(found["identity"] == self._identity)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _move_aside(self) -> None:
        """An earlier run's rounds must not mix with these."""
        there = [self.folder / name for name in (ROUNDS, DAMAGED, DESCRIPTION, ENDED, "events.jsonl", "tensorboard")]
        if not any(path.exists() for path in there):
            return
        aside = _free(self.folder / "before")
        aside.mkdir()
        for path in there:
            if path.exists():
                path.rename(aside / path.name)

    def _copy_newest(self, rounds: Path, names: Iterable[str]) -> None:
        for name in names:
            _copy(place_of(rounds, name, single=""), place_of(self.folder, name))

    def _read(self, folder: Path, damaged: Sequence[str]) -> Checkpoint:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        kept = {}
        for name in state["adapters"]:
            place = place_of(folder, name, single="")
            adapter, manifest = read_adapter(place)
            if manifest is None:
                raise AdapterError(f"{place}: no manifest")
            record = RoundRecord(**json.loads((place / ROUND).read_text(encoding="utf-8")))
            kept[name] = Kept(record, _without_room(adapter), manifest)
        return Checkpoint(state["round"], kept, state["state"], load((folder / ARRAYS).read_bytes()), tuple(damaged))


def _save(folder: Path, kept: Kept) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(folder, kept.adapter, kept.manifest, base_model=kept.base_model, task_type=kept.task_type)
    (folder / ROUND).write_text(json.dumps(_finite(asdict(kept.record)), indent=2, allow_nan=False), encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    """A round's adapter, without what only the coordinator needs."""
    with whole_folder(target) as draft:
        for file in (WEIGHTS, CONFIG, MANIFEST, ROUND):
            shutil.copyfile(source / file, draft / file)


def place_of(folder: Path, name: str, *, single: str = "adapter") -> Path:
    """Where the adapter of a name lies in a federation's folder; ``single`` is the place of the only one, without a name."""
    return folder / "adapters" / name if name else folder / single


def _seal(folder: Path) -> None:
    """Checksums of every file, and all of it forced to the disk: a power loss leaves the folder whole or leaves none."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2), encoding="utf-8")
    for path in [*files, folder / CHECKSUMS, folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _check_seal(folder: Path) -> None:
    sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    for name, wanted in sums.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != wanted:
            raise ValueError(f"{name} is not what was written")


def _without_room(adapter: Adapter) -> Adapter:
    """Files know no rank 0 (``protocol.files``): a pair of rank 1 that is all zeros was one without directions."""
    return Adapter({module: _emptied(pair) for module, pair in adapter.factors.items()}, adapter.dense)


def _emptied(pair: Factors) -> Factors:
    return pair if pair.r != 1 or pair.A.any() or pair.B.any() else Factors(pair.A[:0], pair.B[:, :0], pair.scaling)


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


def export(folder: Path, target: Path, adapter: str = "", number: int | None = None) -> int:
    """Copies a round's adapter to ``target``; returns the round.

    Raises:
        AdapterError: There is no such round or adapter, it is damaged, or the target is there already.
    """
    if target.exists():
        raise AdapterError(f"{target}: is there already; name a new folder")
    there = sorted(path for path in (folder / ROUNDS).glob("[0-9]*") if number is None or int(path.name) == number)
    if not there:
        raise AdapterError(f"{folder / ROUNDS}: no {'round' if number is None else f'round {number}'} is kept here")
    source = place_of(there[-1], adapter, single="")
    if not (source / WEIGHTS).is_file():
        names = sorted(path.name for path in (there[-1] / "adapters").glob("*"))
        said = f"expected one of {', '.join(names)} (--adapter)" if names else "the federation has one adapter, without a name"
        raise AdapterError(f"adapter {adapter!r} is not in {there[-1]}; {said}")
    try:
        _check_seal(there[-1])
    except (OSError, ValueError) as error:
        raise AdapterError(f"{there[-1]}: damaged ({error}); export an earlier round") from None
    _copy(source, target)
    return int(there[-1].name)


def resumable(folder: Path) -> tuple[int, Path]:
    """The round after which a federation that died goes on, and a file that ``flwr run`` takes to do so.

    Raises:
        AdapterError: There is no federation, it has ended, or none of its rounds is good.
    """
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        identity, federation = described["identity"], described["federation"]
    except (OSError, ValueError, KeyError, TypeError):
        raise AdapterError(
            f"{folder / DESCRIPTION}: not there or not readable; name the output folder of a federation"
        ) from None
    if (folder / ENDED).exists():
        raise AdapterError(f"{folder}: the run has ended; start its federation again for a new one")
    found = Ledger(folder, identity=identity).newest()
    if found is None:
        raise AdapterError(f"{folder}: no good round is left; start the federation again, it begins anew")
    file = folder / "resume.yaml"
    write_whole(file, json.dumps(federation | {"output": str(folder.resolve())}, indent=2))
    return found.round, file.resolve()
