"""A coordinator's audit log: who joined, who was asked and answered, what was refused and why, which adapters left.

In it are names, counts, digests and codes; figures and reasons in words are in ``events.jsonl`` and ``round.json``.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.audit import FILE, AuditLog
from protocol.errors import AuditError, FederationError, FedgeError
from protocol.federation import Federation
from protocol.signature import fingerprint, read_private
from server.ledger import published
from server.trust import Trust

_CODED = re.compile(r"the node answered with an error: ([a-z-]{1,40})\b")


class Audited:
    """Writes the log of one run.

    Where the federation names a log, or a key that signs it, lines are written as things happen; else they wait for the first
    round that is kept, for a federation in which none is leaves nothing behind.

    Args:
        federation: Says where the log lies.
        trust: Whose key signs.

    Raises:
        AuditError: The log that is there was changed.
        SignatureError: The key cannot be read.
        FederationError: The log cannot be opened.
    """

    def __init__(self, federation: Federation, trust: Trust | None) -> None:
        self._path = federation.at_rest.audit or federation.output / FILE
        self._trust = trust
        self._waiting: list[tuple[str, dict[str, Any]]] = []
        self._log: AuditLog | None = None
        self._about = {"federation": federation.name}
        self._secret = federation.privacy.secret
        if federation.at_rest.audit or federation.trust.identity:
            self.open()

    @property
    def last(self) -> str | None:
        """The newest line's hash."""
        return self._log.last if self._log else None

    def open(self, expect: str | None = None) -> None:
        """From now on lines are on the disk before what they tell of happens.

        Args:
            expect: The hash that the log must hold: of the line that was the newest when a round was kept.
        """
        if self._log is None or expect is not None:
            try:
                self._log = AuditLog(self._path, self._key, expect)
            except OSError as error:
                raise self._cannot(error) from None
        waiting, self._waiting = self._waiting, []
        for event, facts in waiting:
            self._write(event, **facts)

    def member(self, event: str, facts: Mapping[str, Any]) -> None:
        """Somebody joined or was left out."""
        node = str(facts["node"])
        if event == "joined":
            key = self._trust.nodes.get(node) if self._trust else None
            told = {name: facts[name] for name in ("adapter", "method", "r") if facts.get(name)}
            self._write(event, node=node, key=fingerprint(key) if key else "unsigned", **told)
        else:
            self._write(event, node=node, code=code_of(str(facts.get("reason", ""))))

    def asked(self, number: int, attempt: int, nodes: list[str]) -> None:
        """A round begins; these are there to be asked."""
        self._write("asked", round=number, attempt=attempt, nodes=nodes)

    def answered(self, number: int, adapter: str, done: Any) -> None:
        """What became of those who were asked (``server.training_round.Trained``); of a secret draw, of how many."""
        told = {kind: {n: code_of(why) for n, why in getattr(done, kind).items()} for kind in ("refused", "silent", "paused")}
        names = {"accepted": sorted(done.accepted), "dropped": sorted(done.dropped)}
        facts = {kind: len(what) if self._secret else what for kind, what in {**names, **told}.items() if what}
        self._write("answered", round=number, adapter=adapter, **facts)

    def released(self, number: int, adapter: str, digest: str, epsilon: float | None) -> None:
        """A global adapter, which from here on leaves."""
        self._write(
            "released", round=number, adapter=adapter, digest=digest, **({} if epsilon is None else {"epsilon": epsilon})
        )

    def ended(self, number: int) -> None:
        """No more rounds."""
        self._write("ended", round=number)

    @property
    def _key(self) -> Ed25519PrivateKey | None:
        return self._trust.identity if self._trust else None

    def _write(self, event: str, **facts: Any) -> None:
        if self._log is None:
            self._waiting.append((event, facts))
            return
        try:
            self._log.write(event, **self._about, **facts)
        except OSError as error:
            raise self._cannot(error) from None

    def _cannot(self, error: OSError) -> FederationError:
        return FederationError(
            f"{self._path}: the audit log cannot be written ({error.strerror or error}); every round that was kept is there; "
            "make room, then start the same federation again: it goes on from there"
        )


def exported(folder: Path, number: int, adapter: str, digest: str) -> None:
    """Notes that an adapter was copied out of a federation's folder, where that has a log.

    Raises:
        AuditError: The log was changed, or cannot be written.
        UserError: The key that signs it cannot be read.
    """
    federation = published(folder)
    path = (federation and federation.at_rest.audit) or folder / FILE
    if federation is None or not path.exists():
        return
    identity = federation.trust.identity
    try:
        log = AuditLog(path, read_private(identity) if identity else None)
        log.write("exported", federation=federation.name, round=number, adapter=adapter, digest=digest)
    except OSError as error:
        raise AuditError(f"{path}: cannot be written ({error.strerror or error}); nothing leaves unnoted") from None


def code_of(reason: str) -> str:
    """A reason as an audit log may hold it: a code, for what is said in words may quote what a node has sent."""
    if (found := _CODED.match(reason)) and found[1] in _codes(FedgeError):
        return found[1]
    if reason.startswith("no reply"):
        return "no-reply"
    return "policy" if "policy" in reason.split(":")[0] else "unfit"


def _codes(kind: type[FedgeError]) -> set[str]:
    """Those that there are: a node could make up others."""
    return {kind.code}.union(*(_codes(each) for each in kind.__subclasses__()))
