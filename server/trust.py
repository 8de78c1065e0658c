"""Who is who, for a coordinator: the key that it signs with, whose answers count now, and numbers that only grow."""

import logging
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol.enrolment import read_enrolment
from protocol.errors import ConfigurationError, FederationError
from protocol.files import write_whole
from protocol.signature import fingerprint, key_id, read_private
from protocol.trust_settings import TrustSettings

log = logging.getLogger("flwr")
# Nanoseconds that are kept ahead of those in use: a file is written every 18 minutes, and not for every message.
_AHEAD = 2**40
_MOST = 2**62  # nanoseconds in the year 2116; what travels ends at 2^63


class Trust:
    """A coordinator's key and its list of who is enrolled.

    Args:
        identity: What it signs with.
        listed: The list; nodes that are enrolled or revoked while a run goes on are so from its next round on.

    Raises:
        ConfigurationError: The list cannot be read, or the key is not enrolled there as a coordinator's.
    """

    def __init__(self, identity: Ed25519PrivateKey, listed: Path) -> None:
        self.identity = identity
        self._listed = listed
        self.enrolment = read_enrolment(listed)
        self.nodes: dict[str, Ed25519PublicKey] = dict(self.enrolment.nodes)
        own = key_id(identity.public_key())
        if own not in map(key_id, self.enrolment.coordinators.values()):
            raise ConfigurationError(
                str(listed),
                [
                    f"the coordinator's key, {fingerprint(identity.public_key())}, is not enrolled with role coordinator, and "
                    "no node would hear it; enrol it, and give every node the new list"
                ],
            )

    @classmethod
    def of(cls, settings: TrustSettings) -> "Trust | None":
        """As a federation's file says; None where it says nothing.

        Raises:
            UserError: One of its files cannot be read, or they do not go together.
        """
        if settings.identity is None or settings.enrolled is None:
            if settings.signed:
                raise ConfigurationError(
                    "federation", ["trust.signed: keys are made in simulations alone; name trust.enrolled and trust.identity"]
                )
            return None
        return cls(read_private(settings.identity), settings.enrolled)

    def look_again(self) -> None:
        """Reads the list anew; ``nodes`` stays the same object. A list that is being written or is broken changes nothing."""
        try:
            found = read_enrolment(self._listed)
        except ConfigurationError as error:
            log.warning("who was enrolled before still is: %s", error)
            return
        for name in sorted(self.nodes.keys() - found.nodes.keys()):
            log.warning("%s; it is asked no more", found.why_not(name))
        self.enrolment = found
        self.nodes.clear()
        self.nodes.update(found.nodes)


class Numbers:
    """Numbers that only grow, over restarts and with a clock that goes back: nanoseconds of the clock where that has not.

    Args:
        file: Keeps a number that none in use has reached.

    Raises:
        FederationError: The file holds something else, or cannot be written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._last = self._kept = self._read()

    def next(self) -> int:
        """One above all before."""
        found = max(time.time_ns(), self._last + 1)
        if found > self._kept:
            self._kept = found + _AHEAD
            try:
                write_whole(self._file, str(self._kept), mode=0o600)
            except OSError as error:
                raise FederationError(f"{self._file}: cannot be written ({error.strerror or error}); make room") from None
        self._last = found
        return found

    def _read(self) -> int:
        try:
            found = int(self._file.read_text(encoding="ascii"))
        except FileNotFoundError:
            return 0
        except (OSError, ValueError):
            found = -1
        if not 0 <= found < _MOST:
            raise FederationError(
                f"{self._file}: expected a number below 2^62; without it messages may look old to nodes. Delete it if this "
                "machine's clock has never gone back"
            )
        return found
