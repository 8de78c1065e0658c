"""Verbs of ``fedge edge`` with which a device learns: from rows, from what its user said, and back."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge.device_commands import Bundle, Json, Sealed, Threads, Trusted, existing, tell, trusted, vault_of

if TYPE_CHECKING:
    from edge.runtime.adapting.learning import Settings
    from edge.runtime.adapting.replay import ReplayBuffer


def mount(edge: typer.Typer) -> None:
    """Adds the verbs to ``fedge edge``."""
    for verb in (adapt, rollback, status, feedback):
        edge.command()(verb)


def adapt(
    bundle: Bundle,
    key: Trusted,
    rows: Annotated[
        Path | None, typer.Argument(help="JSON Lines: prompt + answer, messages, text, text + label, or two answers.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Keeps what is learnt; else BUNDLE-own.")] = None,
    adapter: Annotated[str | None, typer.Option(help="One of the bundle's to begin the first training from.")] = None,
    beneath: Annotated[
        bool, typer.Option("--beneath", help="The one of --adapter stays; the device's own is learnt on top of it.")
    ] = False,
    replay: Annotated[Path | None, typer.Option(help="Rows of what is not to be forgotten.")] = None,
    replay_buffer: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Sealed sample of rows learnt before, which are replayed and joined by these."),
    ] = None,
    learns: Annotated[
        Path | None, typer.Option("--feedback", metavar="FOLDER", help="Learns from what users said, in place of ROWS or too.")
    ] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Feedback: corrected answers against the first ones (DPO).")] = False,
    vault: Sealed = None,
    config: Annotated[Path | None, typer.Option(help="YAML with settings of how it learns (docs/edge.md).")] = None,
    seconds: Annotated[float | None, typer.Option(help="Longest time; what is unfinished goes on at the next call.")] = None,
    steps: Annotated[int | None, typer.Option(help="Most steps of this call.")] = None,
    memory: Annotated[int | None, typer.Option(metavar="MB", help="Stops where the whole process has more.")] = None,
    battery: Annotated[float | None, typer.Option(metavar="PERCENT", help="Stops below it, unless it charges.")] = None,
    celsius: Annotated[float | None, typer.Option(help="Stops where the hottest part is above it.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Learns from rows on this device; what is in use changes only if that is better on rows held back. Nothing is sent."""
    from edge.runtime.adapting import adapt as adapting
    from edge.runtime.adapting.budget import Budget
    from edge.runtime.adapting.learning import Settings
    from edge.runtime.adapting.replay import ReplayBuffer
    from edge.runtime.adapting.rows import read, task_of
    from edge.runtime.adapting.sealing import seal_of
    from edge.runtime.session import Resources
    from protocol.configuration import load, parse
    from protocol.errors import DataError

    settings = load(config, Settings) if config else Settings()
    limits = {"seconds": seconds, "steps": steps, "battery_percent": battery, "celsius": celsius}
    budget = parse(limits | {"memory_bytes": memory and memory * 1_000_000}, Budget, source="command line")
    place = folder or _own(bundle)
    device = adapting.Device(place, seal_of(place, vault_of(vault) if vault else None), Resources(threads=threads))
    data = read(rows) if rows else []
    said: list[str] = []
    if learns:
        settings, found, said = _from_feedback(bundle, key, learns, vault, settings, pairs)
        data += found
    elif rows is None:
        raise DataError("nothing to learn from; give rows, or what users said (--feedback FOLDER)")
    buffer = ReplayBuffer(replay_buffer, vault_of(vault)) if replay_buffer else None
    replayed = (read(replay) if replay else []) + (buffer.rows(task_of(data[0])) if buffer else [])
    if learns and not replayed:
        said.append("nothing is replayed, so what it forgets is not measured: give --replay, or a --replay-buffer with rows")
    made = adapting.adapt(
        bundle,
        data,
        budget,
        trusted=trusted(key),
        device=device,
        settings=settings,
        adapter=adapter,
        beneath=beneath,
        replay=replayed,
        watch=lambda step, loss: None if as_json else typer.echo(f"step {step}: loss {loss:.4f}", err=True),
    )
    learnt = made.learnt
    if buffer and made.version and learnt.ended:  # before it has ended other rows to replay would be another training
        said.append(_replayed_later(buffer, data))
    before, after = learnt.before, learnt.after
    figures = f"loss {before.loss:.4f} -> {after.loss:.4f}, accuracy {before.accuracy:.3f} -> {after.accuracy:.3f}"
    lines = [f"{learnt.steps} steps; {learnt.ended or f'stopped at {learnt.stopped}, goes on at the next call'}"]
    lines += [f"held-back rows: {figures}"] if before.loss else []
    lines += [
        f"version {made.version} is in use: {made.why}" if made.version else f"not kept: {made.why}",
    ]
    told = made.told()
    tell(told | {"said": [*said, *told["said"]]}, [*lines, *said, *learnt.said], as_json)


def rollback(
    bundle: Bundle,
    folder: Annotated[Path | None, typer.Option(help="What was learnt; else BUNDLE-own.")] = None,
    vault: Sealed = None,
) -> None:
    """Takes the adapter that was in use before back into use; the bundle's own is the first."""
    from edge.runtime.adapting.personal import Personal
    from edge.runtime.adapting.sealing import seal_of
    from edge.runtime.adapting.state import alone_in

    place = existing(folder or _own(bundle))
    with alone_in(place):
        number = Personal(place, seal_of(place, vault_of(vault) if vault else None)).roll_back()
    typer.echo(f"version {number} is in use" if number else "the bundle's own adapter is in use")


def status(
    bundle: Bundle,
    folder: Annotated[Path | None, typer.Option(help="What was learnt; else BUNDLE-own.")] = None,
    vault: Sealed = None,
    as_json: Json = False,
) -> None:
    """What this device has learnt: which version is in use, what was measured of it, whether a training is unfinished."""
    from edge.runtime.adapting.personal import Personal
    from edge.runtime.adapting.sealing import seal_of
    from edge.runtime.adapting.state import Trail
    from protocol.errors import shown

    place = existing(folder or _own(bundle))
    seal = seal_of(place, vault_of(vault) if vault else None)
    own = Personal(place, seal)
    now, wrong = own.current()
    state, damaged = Trail(place, seal).newest()
    unfinished = state.facts.get("step") if state else None
    told = {"in_use": now.number if now else 0, "facts": dict(now.facts) if now else {}, "kept": own.numbers()}
    lines = [f"version {now.number} is in use" if now else "the bundle's own adapter is in use"]
    lines += [f"  {shown(name)}: {shown(str(value))}" for name, value in (now.facts.items() if now else ())]
    lines += [f"a training is unfinished after step {unfinished}"] if state else []
    tell(told | {"unfinished_step": unfinished, "said": [*wrong, *damaged]}, [*lines, *wrong, *damaged], as_json)


def feedback(
    folder: Annotated[Path, typer.Argument(help="Where fedge edge serve --feedback keeps it.")],
    vault: Sealed = None,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Writes the rows that it makes, in the clear, for adapt.")
    ] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Rows of a better and a worse answer, from corrections.")] = False,
    bundle: Annotated[Path | None, typer.Option(help="For --export: whose tokenizer looks at the rows.")] = None,
    key: Annotated[list[Path] | None, typer.Option("--key", envvar="FEDGE_TRUSTED_KEY", help="Of the bundle.")] = None,
    wipe: Annotated[bool, typer.Option("--wipe", help="Forgets all of it; nothing else is done.")] = False,
    as_json: Json = False,
) -> None:
    """Counts what users said of answers, makes rows of it, or forgets it."""
    from edge.runtime.adapting.feedback import Store, counts, learnable, screen_of
    from edge.runtime.verify import signed_manifest
    from protocol.errors import ConfigurationError
    from protocol.files import write_whole

    store = Store(existing(folder, "serve --feedback"), vault_of(vault))
    if wipe:
        there = store.wipe()
        tell({"wiped": there}, [f"{folder}: {'overwritten and removed' if there else 'nothing was kept'}"], as_json)
        return
    entries = store.entries()
    told: dict[str, Any] = counts(entries)
    lines = [", ".join(f"{count} {kind}" for kind, count in told.items() if kind != "size_bytes")]
    if export:
        if bundle is None or not key:
            raise ConfigurationError("feedback", ["export: expected --bundle and --key, whose tokenizer looks at the rows"])
        manifest, _, _ = signed_manifest(bundle, trusted(key))
        found = learnable(entries, screen_of(bundle, manifest), pairs=pairs)
        write_whole(export, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows), mode=0o600)
        told |= {"rows": len(found.rows), "refused": dict(found.refused)}
        lines += [*found.said(), f"{export}: written in the clear; remove it once it is learnt"]
    tell(told, lines, as_json)


def _from_feedback(
    bundle: Path, key: Sequence[Path], folder: Path, vault: Path | None, settings: "Settings", pairs: bool
) -> "tuple[Settings, list[dict[str, Any]], list[str]]":
    """Settings that guard against it, the rows that may be learnt from, and what is to be said of others."""
    from edge.runtime.adapting.feedback import Store, guarded, learnable, screen_of
    from edge.runtime.verify import signed_manifest

    manifest, _, _ = signed_manifest(bundle, trusted(key))
    found = learnable(
        Store(existing(folder, "serve --feedback"), vault_of(vault)).entries(), screen_of(bundle, manifest), pairs=pairs
    )
    for line in found.said():
        typer.echo(line, err=True)
    return guarded(settings, len(found.rows)), list(found.rows), found.said()


def _replayed_later(buffer: "ReplayBuffer", rows: Sequence[Mapping[str, Any]]) -> str:
    """What became of rows that are to be replayed; the adapter is in use already, whatever that is."""
    from protocol.errors import FedgeError

    try:
        return f"replay: {buffer.add(rows)} rows are kept"
    except (FedgeError, OSError) as error:
        return f"replay: the rows of this training are not kept: {error}"


def _own(bundle: Path) -> Path:
    """Beside the bundle, which stays as it was signed."""
    return bundle.resolve().with_name(f"{bundle.resolve().name}-own")
