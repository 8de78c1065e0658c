"""Packs what an auditor may read out of a federation's folder."""

from pathlib import Path

from protocol.audit import FILE, AuditLog, verify
from protocol.audit_bundle import lines, without_figures, write_bundle
from protocol.errors import AuditError
from protocol.privacy.ledger import FILE as PRIVACY
from protocol.sealed_folder import folder_in_memory
from protocol.signature import read_private
from protocol.vault import Vault
from server.events import FILE as EVENTS
from server.events import read_events
from server.ledger import published


def export_for_auditor(
    folder: Path, target: Path, identity: Path | None, key: Path | None, passphrase_env: str | None
) -> list[str]:
    """Writes a bundle (``protocol.audit_bundle``); returns the names of what is in it.

    Args:
        folder: Of the federation.
        target: A new folder, or a new file where it is sealed.
        identity: The coordinator's key, in place of the one that the federation names.
        key: Seals the bundle.
        passphrase_env: Of that key.

    Raises:
        AuditError: There is no federation, no log or no key that signs, the log does not hold, or the target is there.
        UserError: A key cannot be read.
    """
    federation = published(folder)
    if federation is None:
        raise AuditError(f"{folder}: not the output folder of a federation that has kept a round")
    signer = identity or federation.trust.identity
    if signer is None:
        raise AuditError(f"{folder}: its federation names no key (trust.identity), and an auditor is given nothing unsigned")
    if target.exists():
        raise AuditError(f"{target}: is there already; name a new one")
    private, vault = read_private(signer), Vault.at(key, passphrase_env) if key else None
    log, own = federation.at_rest.audit or folder / FILE, federation.trust.identity
    AuditLog(log, read_private(own) if own else None).write("exported-log", federation=federation.name)
    report = verify(log)
    secret = federation.privacy.secret
    events = [without_figures(event.model_dump(mode="json"), secret=secret) for event in read_events(folder)]
    files = {FILE: log.read_bytes(), EVENTS: lines(events)}
    if (spent := federation.privacy.ledger or folder / PRIVACY).exists():
        files[PRIVACY] = spent.read_bytes()
    if vault is None:
        write_bundle(target, federation.name, files, report.last, private)
        return sorted(files)
    with folder_in_memory() as place:
        write_bundle(place / "audit", federation.name, files, report.last, private)
        vault.pack(place / "audit", target, {"kind": "audit-bundle", "federation": federation.name})
    return sorted(files)
