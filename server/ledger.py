"""Every round on disk: the global adapters, who took part, what was measured and all that a coordinator must know to go on.

``rounds/0001/`` appears whole or not at all, with a checksum of every file. A coordinator that died goes on after the newest
round whose checksums hold.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from protocol.adapter import Adapter, Array, Factors
from protocol.codec import encode
from protocol.durable import to_disk
from protocol.errors import AdapterError, FederationError, FedgeError, VaultError, shown
from protocol.federation import Federation
from protocol.files import MANIFEST, private_folder, read_adapter, save_adapter, whole_folder, write_whole
from protocol.formats import CONFIG, WEIGHTS
from protocol.manifest import Manifest
from protocol.plan import Plan
from protocol.release import SIGNATURE
from protocol.sealed_folder import folder_in_memory
from protocol.vault import SUFFIX, Vault
from server.events import FILE as EVENTS
from server.events import TENSORBOARD, finite

log = logging.getLogger("flwr")
T = TypeVar("T")
ROUND, STATE, ARRAYS, CHECKSUMS = "round.json", "state.json", "state.safetensors", "checksums.json"
DESCRIPTION, ENDED, ROUNDS, DAMAGED = "federation.json", "ended.json", "rounds", "damaged"
RESUME, ADAPTER, ADAPTERS, ISSUED = "resume.yaml", "adapter", "adapters", "issued"
_SEALED_ROUND, _OWNER_ONLY = "round", 0o600
# An adapter's name (``protocol.federation.AdapterName``), and which part of it after splits.
_PLACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}(/part-[12])*")


@dataclass(frozen=True)
class RoundRecord:
    """One round of one adapter as the coordinator saw it.

    Attributes:
        round: From 1; 0 is before any training.
        adapter: Which of the federation's adapters; empty where there is but one.
        stage: Which of its stages; empty where there are none.
        accepted: Metrics by node name, of the updates that were merged.
        refused: Reason by node name, of the updates that were quarantined.
        silent: Reason by node name, of the nodes that sent nothing that could be read in time.
        paused: Reason by node name, of the nodes that were not asked.
        dropped: Names of the nodes that were asked beyond the cohort and not waited for.
        evaluation: Metrics by node name, measured by the nodes on their held-out rows with the new global adapter.
        evaluation_refused: Reason by node name, of those that could not measure.
        norms: Size of each accepted update's change, in product space.
        merge: What the aggregation reported.
        privacy: Of a release with noise: epsilon of all so far, delta, the budget, the noise multiplier, the clipping norm.
        bytes_sent, bytes_received: Of adapters, as packed on the wire; what was refused unread is no adapter.
        seconds: From the first message to the merged adapter.
    """

    round: int
    adapter: str = ""
    stage: str = ""
    accepted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    silent: Mapping[str, str] = field(default_factory=dict)
    paused: Mapping[str, str] = field(default_factory=dict)
    dropped: Sequence[str] = field(default_factory=list)
    evaluation: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    evaluation_refused: Mapping[str, str] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)
    merge: Mapping[str, Any] = field(default_factory=dict)
    privacy: Mapping[str, float] = field(default_factory=dict)
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0

    @property
    def title(self) -> str:
        """The round as a line of a log begins."""
        of = f" of {self.adapter}" if self.adapter else ""
        return f"round {self.round}{of} ({self.stage})" if self.stage else f"round {self.round}{of}"


@dataclass(frozen=True)
class Kept:
    """One adapter after a round.

    Attributes:
        record: The round.
        adapter, manifest: What it made.
        plan: What it was trained with, for ``adapter_config.json``.
    """

    record: RoundRecord
    adapter: Adapter
    manifest: Manifest
    plan: Plan


# Called with a folder in which an adapter was written, its name and what it is.
Sign = Callable[[Path, str, Kept], None]


def unsigned(folder: Path, name: str, kept: Kept) -> None:
    """Signs nothing."""


@dataclass(frozen=True)
class Checkpoint:
    """All that is known after a round.

    Attributes:
        round: Which.
        kept: One per adapter, by its name.
        state: What the rest of the coordinator must remember, as JSON.
        arrays: The same, as arrays.
    """

    round: int
    kept: Mapping[str, Kept]
    state: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What a folder holds of a run that died.

    Attributes:
        checkpoint: After its newest good round; None where there is nothing to go on from.
        damaged: Newer rounds, and why each cannot be read.
        another: The newest good round is of another federation, whose run has not ended: its number.
    """

    checkpoint: Checkpoint | None = None
    damaged: Mapping[Path, str] = field(default_factory=dict)
    another: int = 0

    def told(self) -> list[str]:
        """What is damaged, a line each."""
        return [f"round {int(path.name)} is damaged ({why})" for path, why in self.damaged.items()]


class _Described(BaseModel):
    plan: Plan
    empty: tuple[str, ...]


class _State(BaseModel):
    """``state.json``. The identity stands here too: ``federation.json`` may be lost, and the rounds are not.

    ``empty`` names the modules without directions. PEFT's files know no rank 0 (``protocol.formats``): theirs are of rank 1.
    """

    identity: str
    round: int
    adapters: dict[str, _Described]
    state: dict[str, Any]


_RECORD, _STATE, _OBJECT = TypeAdapter(RoundRecord), TypeAdapter(_State), TypeAdapter(dict[str, Any])


class Ledger:
    """The folder of one federation.

    ``rounds/0001/`` holds a PEFT adapter, its manifest and ``round.json``, and the coordinator's state; ``adapter/`` is a copy
    of the newest adapter. Where there are several adapters they lie in ``rounds/0001/adapters/NAME/`` and ``adapters/NAME/``.

    Whatever writes raises a FederationError where the disk does not take it, and leaves every earlier round as it was.

    Args:
        folder: Created when the first round is kept.
        identity: What makes this federation the same as one that began here earlier; rounds of another are moved aside.
        sign: Signs adapters as they are kept.
        vault: Seals each round into one file of its folder, ``round.sealed``; there is then no copy in ``adapter/``.
    """

    def __init__(self, folder: Path, *, identity: str, sign: Sign = unsigned, vault: Vault | None = None) -> None:
        self.folder = folder
        self._identity = identity
        self._sign = sign
        self._vault = vault
        self._last = 0

    def check(self) -> None:
        """Tries whether the folder can be written: nobody should train for one that cannot. Leaves nothing behind.

        Raises:
            FederationError: It cannot, or something in it is a link.
        """
        try:
            there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists() or path.is_symlink())
            tempfile.TemporaryDirectory(dir=there).cleanup()
            _refuse_links(self.folder)
        except OSError as error:
            raise FederationError(
                f"output {shown(str(self.folder), 200)} cannot be written ({error.strerror or error}); name another folder"
            ) from None

    def keep(self, checkpoint: Checkpoint) -> Path:
        """Writes one round; returns its folder.

        Raises:
            FederationError: The disk does not take it, or it would not be read back as it is.
        """
        number = checkpoint.round
        target = self.folder / ROUNDS / f"{number:04d}"
        with self._disk(f"round {number}"):
            if number == 1:
                self._move_aside()
            if not self.folder.exists():
                private_folder(self.folder)
            private_folder(target.parent)
            with whole_folder(target, private=True) as draft:
                with _written(draft, self._vault, number) as inside:
                    self._write(inside, checkpoint)
                _seal(draft)
        self._last = number
        with self._disk(f"the copy of round {number}"):
            self._copy_newest(target, checkpoint.kept)
        return target

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Writes ``federation.json``: what was published and what each node offered."""
        with self._disk(DESCRIPTION):
            told = json.dumps({"identity": self._identity, **facts}, indent=2, default=str)
            write_whole(self.folder / DESCRIPTION, told, _OWNER_ONLY)

    def end(self, number: int, reason: str) -> None:
        """Marks the run as ended: the same federation, started again, begins anew."""
        with self._disk(ENDED):
            write_whole(self.folder / ENDED, json.dumps({"round": number, "reason": reason}), _OWNER_ONLY)

    def newest(self) -> Found:
        """The last good round of a run of this federation that has not ended. Changes nothing.

        Raises:
            VaultError: A round that is whole does not open: a key that is not the one it was sealed with damages nothing.
        """
        damaged: dict[Path, str] = {}
        if (self.folder / ENDED).exists():
            return Found()
        for folder in reversed(_rounds(self.folder)):
            try:
                _check_seal(folder)
                with opened(folder, self._vault) as inside:
                    identity, checkpoint = _read(inside)
            except VaultError:
                raise
            except (FedgeError, OSError, ValueError, SafetensorError) as error:
                damaged[folder] = shown(" ".join(str(error).split()))
                continue
            return Found(checkpoint, damaged) if identity == self._identity else Found(another=checkpoint.round)
        return Found(damaged=damaged)

    def of_another(self, number: int, federation: Federation) -> str:
        """Why nothing begins in a folder that holds ``number`` rounds of another federation's run."""
        try:
            keys = ", ".join(federation.differing(_published(self.folder))[:8])
        except (OSError, ValueError, KeyError):
            keys = f"{DESCRIPTION} does not say what"
        return (
            f"{self.folder}: holds {number} round(s) of a run that has not ended, and this one computes something else (other "
            f"values of {keys}); set them back to go on, name another output (start: {self.folder / ADAPTER} goes on from what "
            "was reached), or move the folder away to begin anew"
        )

    def mend(self, found: Found) -> list[str]:
        """Readies the folder for going on with what ``newest`` found there.

        Damaged rounds go to ``damaged/``, drafts of a coordinator that was killed go for good, and the newest adapter is copied
        again: it may have died between keeping a round and copying it.

        Returns:
            What was damaged, and what became of it, a line each.
        """
        said = []
        with self._disk("what was found damaged"):
            for folder, line in zip(found.damaged, found.told(), strict=True):
                aside = _free(self.folder / DAMAGED / folder.name)
                aside.parent.mkdir(exist_ok=True)
                folder.rename(aside)
                said.append(f"{line}; it was moved to {aside}")
            for draft in _drafts(self.folder):
                if draft.is_dir():
                    shutil.rmtree(draft)
                else:
                    draft.unlink(missing_ok=True)
            if found.checkpoint:
                self._last = found.checkpoint.round
                self._copy_newest(self.folder / ROUNDS / f"{self._last:04d}", found.checkpoint.kept)
        if found.checkpoint and not self._is_described():
            said.append(f"{DESCRIPTION} is missing or damaged; it is written again")
        for line in said:
            log.warning("%s", line)
        return said

    @contextmanager
    def _disk(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            last = f"the last good one is {self._last}" if self._last else "there is none before it"
            raise FederationError(
                f"{what} cannot be kept in {self.folder} ({getattr(error, 'strerror', None) or error}); {last}; "
                "make room, then start the same federation again: it goes on from there"
            ) from None

    def _write(self, draft: Path, checkpoint: Checkpoint) -> None:
        """Names and shapes of tensors come from nodes: what files would not give back as it is must end the run before."""
        try:
            _write(draft, checkpoint, self._identity, self._sign)
            _, found = _read(draft)
            wrong = [
                n for n, k in checkpoint.kept.items() if found.kept[n].adapter.digest() != encode(k.adapter, "fp32").digest()
            ]
            problem = f"read back, adapter {wrong[0]!r} is another" if wrong else ""
        except (FedgeError, LookupError, ValueError) as error:
            problem = shown(" ".join(str(error).split()))
        if problem:
            raise FederationError(
                f"round {checkpoint.round} cannot be kept in {self.folder}: {problem}; the last good round is {self._last}; "
                "files of this method cannot hold tensors of such names and shapes: go on without the nodes that offered them"
            )

    def _is_described(self) -> bool:
        try:
            return bool(_json(self.folder / DESCRIPTION, _OBJECT).get("identity") == self._identity)
        except (OSError, ValueError):
            return False

    def _move_aside(self) -> None:
        """An earlier run's rounds must not mix with these."""
        there = [self.folder / name for name in (ROUNDS, DAMAGED, DESCRIPTION, ENDED, EVENTS, TENSORBOARD)]
        if not any(path.exists() for path in there):
            return
        aside = _free(self.folder / "before")
        aside.mkdir()
        for path in there:
            if path.exists():
                path.rename(aside / path.name)
        log.warning("the rounds of the run before are now in %s", aside)

    def _copy_newest(self, rounds: Path, names: Iterable[str]) -> None:
        for name in names if self._vault is None else ():
            _copy(place_of(rounds, name, single=""), place_of(self.folder, name), private=True)


def _rounds(folder: Path) -> list[Path]:
    """Folders of rounds, oldest first; what else lies there, as somebody's copy of one, is none."""
    there = [path for path in (folder / ROUNDS).glob("*") if re.fullmatch("[0-9]{4,9}", path.name)]
    return sorted((path for path in there if path.is_dir() and not path.is_symlink()), key=lambda path: int(path.name))


def _write(folder: Path, checkpoint: Checkpoint, identity: str, sign: Sign) -> None:
    described = {}
    for name, kept in checkpoint.kept.items():
        place = place_of(folder, name, single="")
        place.mkdir(parents=True, exist_ok=True)
        save_adapter(place, kept.adapter, kept.manifest, kept.plan)
        sign(place, name, kept)
        (place / ROUND).write_text(json.dumps(finite(asdict(kept.record)), indent=2, allow_nan=False), encoding="utf-8")
        described[name] = _Described(plan=kept.plan, empty=tuple(m for m, r in kept.adapter.ranks().items() if not r))
    state = _State(identity=identity, round=checkpoint.round, adapters=described, state=dict(checkpoint.state))
    (folder / STATE).write_text(json.dumps(state.model_dump(mode="json"), allow_nan=False), encoding="utf-8")
    (folder / ARRAYS).write_bytes(save({name: np.asarray(a, order="C") for name, a in checkpoint.arrays.items()}))


def _read(folder: Path) -> tuple[str, Checkpoint]:
    """A round, and the identity of the federation that it belongs to."""
    state = _json(folder / STATE, _STATE)
    kept = {}
    for name, about in state.adapters.items():
        place = place_of(folder, name, single="")
        adapter, manifest = read_adapter(place)
        if manifest is None:
            raise AdapterError(f"{place}: no manifest")
        kept[name] = Kept(_json(place / ROUND, _RECORD), _without_room(adapter, about.empty), manifest, about.plan)
    return state.identity, Checkpoint(state.round, kept, state.state, load((folder / ARRAYS).read_bytes()))


@contextmanager
def _written(draft: Path, vault: Vault | None, number: int) -> Iterator[Path]:
    """Where a round is written: the draft of its folder, or memory, from where it is sealed into the draft."""
    if vault is None:
        yield draft
        return
    with folder_in_memory() as place:
        (inside := place / _SEALED_ROUND).mkdir()
        yield inside
        vault.pack(inside, draft / f"{_SEALED_ROUND}{SUFFIX}", {"kind": "round", "round": number})


@contextmanager
def opened(folder: Path, vault: Vault | None) -> Iterator[Path]:
    """A round's folder, or what is sealed in it, for as long as the block lasts.

    Raises:
        VaultError: It is sealed and there is no vault, or another one; it is not, and there is a vault.
    """
    sealed = folder / f"{_SEALED_ROUND}{SUFFIX}"
    if vault is None and not sealed.exists():
        yield folder
        return
    if vault is None:
        raise VaultError(f"{folder}: is sealed; name the key file that it was sealed with (at_rest.vault, or --vault)")
    if not sealed.exists():
        raise VaultError(f"{folder}: is not sealed, and there is a vault; leave at_rest.vault out, or name another output")
    with folder_in_memory() as place:
        vault.unpack(sealed, place, {"kind": "round", "round": int(folder.name)})
        yield place / _SEALED_ROUND


def vault_of(federation: Federation) -> Vault | None:
    """The vault of a federation's coordinator; None where it names none.

    Raises:
        VaultError: Its key cannot be read.
    """
    kept = federation.at_rest
    return Vault.at(kept.vault, kept.passphrase_env) if kept.vault else None


def published(folder: Path) -> Federation | None:
    """The federation whose folder this is, as far as the folder says it."""
    try:
        return _published(folder)
    except (OSError, ValueError, KeyError):
        return None


def _copy(source: Path, target: Path, *, figures: bool = True, private: bool = False) -> None:
    """A round's adapter, without what only the coordinator needs."""
    with whole_folder(target, private=private) as draft:
        signed = [SIGNATURE] if (source / SIGNATURE).is_file() else []
        for file in (WEIGHTS, CONFIG, MANIFEST, *signed, *([ROUND] if figures else [])):
            shutil.copyfile(source / file, draft / file)


def place_of(folder: Path, name: str, *, single: str = ADAPTER) -> Path:
    """Where the adapter of a name lies in a federation's folder; ``single`` is the place of the only one, without a name.

    Raises:
        AdapterError: It is no adapter's name.
    """
    if name and not _PLACE.fullmatch(name):
        raise AdapterError(f"adapter {shown(name, 80)!r}: found no name of an adapter; expected letters, digits, - and _")
    return folder / ADAPTERS / name if name else folder / single


def newest_place(federation: Federation, name: str) -> Path:
    """Where a person finds the newest adapter of a name; the rounds, where they are sealed and export opens them."""
    return federation.output / ROUNDS if federation.at_rest.vault else place_of(federation.output, name)


def _refuse_links(folder: Path) -> None:
    """What is written, moved and replaced must lie in the folder itself, whoever made it."""
    places = [folder / name for name in (ROUNDS, DAMAGED, ADAPTER, ADAPTERS, EVENTS, TENSORBOARD)]
    for path in chain(places, (folder / ADAPTERS).rglob("*")):
        if path.is_symlink():
            raise FederationError(f"{path}: found a link, expected a file or folder of the federation's own; remove it")


def _drafts(folder: Path) -> list[Path]:
    """What a coordinator that was killed has begun to write (``protocol.files``)."""
    single = [draft for name in (ADAPTER, DESCRIPTION, ENDED, RESUME, ISSUED) for draft in folder.glob(f".{name}-*")]
    return [*single, *(folder / ROUNDS).glob(".[0-9]*-*"), *(folder / ADAPTERS).rglob(".*-*")]


def _files(folder: Path) -> dict[str, Path]:
    """Everything in a folder but its folders and its checksums, by its path there."""
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    return {name: path for name, path in sorted(there.items()) if name != CHECKSUMS}


def _seal(folder: Path) -> None:
    """Checksums of every file, and all of it forced to the disk: a power loss leaves the folder whole or leaves none."""
    files = _files(folder)
    sums = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2), encoding="utf-8")
    for path in [*files.values(), folder / CHECKSUMS, folder]:
        to_disk(path)


def _check_seal(folder: Path) -> None:
    """Every file is there and as it was written, and none besides: what has no checksum was not kept by us."""
    sums, files = _json(folder / CHECKSUMS, _OBJECT), _files(folder)
    if odd := sorted(sums.keys() ^ files.keys()):
        raise ValueError(f"{shown(odd[0], 80)} is {'missing' if odd[0] in sums else 'not of this round'}")
    for name, path in files.items():
        if path.is_symlink() or not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sums[name]:
            raise ValueError(f"{shown(name, 80)} is not what was written")


def _json(path: Path, kind: TypeAdapter[T]) -> T:
    """What a file holds; a ValueError where it is missing, a link, or holds something else."""
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name} is missing")
    try:
        return kind.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in (path.name, *first["loc"]))
        raise ValueError(f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


def _without_room(adapter: Adapter, empty: Iterable[str]) -> Adapter:
    """Directions that files needed are taken from the modules that have none."""
    factors = dict(adapter.factors)
    for module in empty:
        pair = factors[module]
        factors[module] = Factors(pair.A[:0], pair.B[:, :0], pair.scaling)
    return Adapter(factors, adapter.dense)


def _free(path: Path) -> Path:
    number = 1
    while (found := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return found


def export(
    folder: Path,
    target: Path,
    adapter: str = "",
    number: int | None = None,
    *,
    figures: bool = False,
    vault: Vault | None = None,
) -> int:
    """Copies a round's adapter to ``target``; returns the round.

    Args:
        folder: Of the federation.
        target: A new folder.
        adapter: Which, where there are several.
        number: Of the round; without it the newest.
        figures: ``round.json`` as well, which names every institution with its counts, losses and norms.
        vault: Opens rounds that are sealed.

    Raises:
        VaultError: It is sealed, and not with this vault's key.
        AdapterError: There is no such round or adapter, it is damaged, or the target is there already or cannot be written.
    """
    if os.path.lexists(target):
        raise AdapterError(f"{target}: is there already; name a new folder")
    kept = {int(path.name): path for path in _rounds(folder)}
    there = [path for at, path in kept.items() if number in (None, at)]
    if not there:
        said = f"no round {number} is kept here; there are {min(kept)} to {max(kept)}" if kept else "no round is kept here"
        raise AdapterError(f"{folder / ROUNDS}: {said}")
    try:
        _check_seal(there[-1])
    except (OSError, ValueError) as error:
        raise AdapterError(f"{there[-1]}: damaged ({error}); export an earlier round") from None
    with opened(there[-1], vault) as inside:
        _export(inside, there[-1], target, adapter, figures=figures)
    return int(there[-1].name)


def _export(round_folder: Path, shown_as: Path, target: Path, adapter: str, *, figures: bool) -> None:
    source = place_of(round_folder, adapter, single="")
    if not (source / WEIGHTS).is_file():
        inside = round_folder / ADAPTERS
        names = sorted(path.parent.relative_to(inside).as_posix() for path in inside.rglob(WEIGHTS))
        said = f"expected one of {', '.join(names)} (--adapter)" if names else "the federation has one adapter, without a name"
        raise AdapterError(f"adapter {adapter!r} is not in {shown_as}; {shown(said)}")
    try:
        _copy(source, target, figures=figures)
    except OSError as error:
        raise AdapterError(f"{target}: cannot be written ({error.strerror or error}); name another folder") from None


def _published(folder: Path) -> Federation:
    """What ``describe`` wrote; a ValueError or KeyError where it is missing or damaged."""
    return Federation.model_validate(_json(folder / DESCRIPTION, _OBJECT)["federation"])


def resumable(folder: Path) -> tuple[int, Federation, list[str]]:
    """The round after which a federation that died goes on, the federation, and what is damaged.

    Nothing in the folder is changed: the coordinator of this federation may well be running.

    Raises:
        AdapterError: There is no federation, it has ended, or none of its rounds is good.
        VaultError: Its rounds are sealed, and the key does not open them.
    """
    try:
        federation = _published(folder)
    except (OSError, ValueError, KeyError):
        raise AdapterError(
            f"{folder / DESCRIPTION}: not there or not readable; name the output folder of a federation, or start the "
            "federation from its own file: it goes on from its last good round"
        ) from None
    if (folder / ENDED).exists():
        raise AdapterError(f"{folder}: the run has ended; start its federation again for a new one")
    found = Ledger(folder, identity=federation.identity(), vault=vault_of(federation)).newest()
    if found.checkpoint is None:
        raise AdapterError(
            "; ".join([f"{folder}: no good round is left", *found.told(), "start the federation again, it begins anew"])
        )
    return found.checkpoint.round, federation, found.told()


def write_resume(folder: Path, federation: Federation) -> Path:
    """Writes a file that ``flwr run`` takes to go on with the federation of this folder, and returns it."""
    file = folder.resolve() / RESUME
    write_whole(file, json.dumps(federation.model_dump(mode="json") | {"output": str(folder.resolve())}, indent=2))
    return file
