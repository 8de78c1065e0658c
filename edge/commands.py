"""Verbs of the edge: ``fedge edge …``; here those that make bundles, a device's in ``device_`` and ``learning_commands``."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge import device_commands, learning_commands
from edge.device_commands import Json, Trusted, tell, trusted

if TYPE_CHECKING:
    from protocol.plan import Plan
    from strategies.base_model import Base

Signer = Annotated[
    Path, typer.Option("--key", envvar="FEDGE_SIGNING_KEY", help="Private key that signs it (fedge edge keygen), a file.")
]
Adapters = Annotated[
    list[str] | None, typer.Option("--adapter", help="Adapter folder, as NAME=FOLDER or FOLDER; may be given several times.")
]
Budget = Annotated[
    list[str] | None, typer.Option(help="Bound of the comparison in place of the profile's, tighter or looser: NAME=NUMBER.")
]
MaxBytes = Annotated[int | None, typer.Option(min=1, help="Most that the weights may take; within it layers keep 8 bits.")]
Job = Annotated[Path | None, typer.Option(help="The YAML file that the adapters were trained with.")]
Rows = Annotated[Path | None, typer.Option(help="Rows to compare on, with their answers or labels; needs --job.")]
Output = Annotated[Path, typer.Argument(help="New folder for the bundle.")]
Bundle = Annotated[Path, typer.Argument(help="The bundle's folder.")]

edge = typer.Typer(help="Bundles: from adapters to devices without PyTorch.", no_args_is_help=True, suggest_commands=False)
update = typer.Typer(help="From a bundle to its next version: only what changed travels.", no_args_is_help=True)


def mount(app: typer.Typer) -> None:
    """Adds the verbs to the command."""
    device_commands.mount(edge, update)
    learning_commands.mount(edge)
    edge.add_typer(update, name="update")
    app.add_typer(edge, name="edge")


@edge.command()
def keygen(
    path: Annotated[Path, typer.Argument(help="Where the private key goes; the public one lies beside it as PATH.pub.")],
    comment: Annotated[str, typer.Option(help="Whose key it is; stands in the public file.")] = "",
    as_json: Json = False,
) -> None:
    """Makes a key to sign bundles with; devices are given the public one."""
    from protocol.signature import fingerprint, make_key, write_pair

    key = make_key()
    public = write_pair(path, key, comment)
    printed = fingerprint(key.public_key())
    lines = [f"{path}: keep it to yourself", f"{public}: for every device", printed]
    tell({"private": str(path), "public": str(public), "fingerprint": printed}, lines, as_json)


@edge.command()
def export(
    base_model: Annotated[str, typer.Argument(help="Base: a hub name, a folder, an installed package, or tiny.")],
    output: Output,
    key: Signer,
    adapter: Adapters = None,
    profile: Annotated[str, typer.Option(help="How weights are held: q8, q4, int8-dynamic, fp16 or fp32.")] = "q8",
    kind: Annotated[
        str | None, typer.Option(help="decoder, classifier or embedder; else what the adapters were trained for.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of this line of bundles; else the output's.")] = None,
    version: Annotated[int, typer.Option(min=1, help="Higher than that of every bundle of this name before.")] = 1,
    merge: Annotated[bool, typer.Option("--merge", help="Writes the one adapter into the base, for good.")] = False,
    job: Job = None,
    rows: Rows = None,
    calibration: Annotated[Path | None, typer.Option(help="Rows that quantisation may look at: GPTQ.")] = None,
    max_bytes: MaxBytes = None,
    pooling: Annotated[str, typer.Option(help="Of an embedder: mean or cls.")] = "mean",
    budget: Budget = None,
    trainable: Annotated[bool, typer.Option("--trainable", help="Adds graphs with which devices train adapters.")] = False,
    as_json: Json = False,
) -> None:
    """Makes a signed bundle of a base and its adapters; what is too far from PyTorch is not written."""
    from edge.make import Request, make_bundle

    request = Request(
        base_model=base_model,
        output=output,
        key=_signer(key),
        adapters=_named(adapter),
        kind=_one_of("kind", kind, ("decoder", "classifier", "embedder")),
        profile=profile,
        name=name,
        version=version,
        merge=merge,
        plan=_plan(job, rows=rows, calibration=calibration),
        rows=rows,
        calibration=calibration,
        largest_bytes=max_bytes,
        pooling=_one_of("pooling", pooling, ("mean", "cls")),
        budget=_bounds(budget),
        trainable=trainable,
    )
    _made(make_bundle(request, _say), key, as_json)


@edge.command()
def quantize(
    bundle: Bundle,
    output: Output,
    key: Signer,
    profile: Annotated[str, typer.Option(help="How weights are to be held: q8, q4, int8-dynamic or fp16.")] = "q8",
    max_bytes: MaxBytes = None,
    budget: Budget = None,
    as_json: Json = False,
) -> None:
    """Makes a smaller bundle of an fp32 one and compares both; the base and PyTorch are not needed again."""
    from edge.make import requantise

    made = requantise(bundle, profile, output, _signer(key), largest_bytes=max_bytes, budget=_bounds(budget), say=_say)
    _made(made, key, as_json)


@edge.command()
def add(
    bundle: Bundle,
    output: Output,
    key: Signer,
    adapter: Adapters = None,
    base_model: Annotated[str | None, typer.Option(help="Where the base is; else as the bundle calls it.")] = None,
    job: Job = None,
    rows: Rows = None,
    budget: Budget = None,
    as_json: Json = False,
) -> None:
    """Makes the next version of a bundle with more adapters, or others in place of those of the same names."""
    from edge.make import add_adapters
    from edge.runtime.verify import signed_manifest

    adapters, signer, plan = _named(adapter), _signer(key), _plan(job, rows=rows)
    there, _, _ = signed_manifest(bundle, [signer.public_key()])
    made = add_adapters(
        bundle,
        adapters,
        output,
        signer,
        base_model=base_model,
        plan=plan,
        rows=rows,
        budget=_bounds(budget),
        say=_say,
    )
    _made(made, key, as_json, sorted(adapters.keys() & there.adapters.keys()))


@edge.command("hand-over")
def hand_over(
    base_model: Annotated[str, typer.Argument(help="Base: a hub name, a folder, an installed package, or tiny.")],
    output: Annotated[Path, typer.Argument(help="New file (gguf) or folder (genai).")],
    to: Annotated[str, typer.Option(help="gguf: llama.cpp and its kin. genai: onnxruntime-genai.")] = "gguf",
    held: Annotated[str | None, typer.Option("--as", help="gguf: q8_0, f16 or f32. genai: int4, fp16 or fp32.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder that becomes part of the base.")] = None,
    as_json: Json = False,
) -> None:
    """Writes a base, with an adapter merged into it, for a runtime that people have already; neither signed nor compared."""
    from edge.handover import to_genai, to_gguf
    from strategies.base_model import find

    _new(output)
    write: Any = {"gguf": to_gguf, "genai": to_genai}[_one_of("to", to, ("gguf", "genai"))]
    with _merged(find(base_model), adapter, output) as base:
        write(base, output, *filter(None, [held]))
    size = sum(path.stat().st_size for path in [output, *output.rglob("*")] if path.is_file())
    tell({"output": str(output), "size_bytes": size}, [f"{output}: {size:,} bytes, neither signed nor compared"], as_json)


@update.command("make")
def update_make(
    old: Annotated[Path, typer.Argument(help="The bundle that devices have.")],
    new: Annotated[Path, typer.Argument(help="A later version of it.")],
    output: Annotated[Path, typer.Argument(help="New folder for the update.")],
    key: Trusted,
    as_json: Json = False,
) -> None:
    """Writes what a device that has OLD needs for NEW."""
    from dataclasses import asdict

    from edge.bundle import write_update

    made = write_update(output, old, new, trusted(key))
    travels = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    lines = [f"{output}: {made.update_bytes:,} of {made.whole_bytes:,} bytes, {travels:,} with manifest and signature"]
    tell({"output": str(output), "size_bytes": travels, **asdict(made)}, [*lines, *device_commands.changes(made)], as_json)


def _made(folder: Path, key: Path, as_json: bool, replaced: Sequence[str] | None = None) -> None:
    from edge.runtime.verify import verified
    from protocol.signature import read_private

    manifest = verified(folder, [read_private(key).public_key()])
    told, lines = device_commands.facts(folder, manifest), device_commands.summary(folder, manifest)
    if replaced is not None:
        told["replaced"] = replaced
        lines += [f"  {name}: replaced the adapter of this name" for name in replaced]
    tell(told, lines, as_json)


@contextmanager
def _merged(base: "Base", adapter: Path | None, output: Path) -> "Iterator[Base]":
    """The base itself, or one with the adapter in it, for as long as it is needed."""
    if adapter is None:
        yield base
        return
    from protocol.files import read_stored
    from strategies.adapters.merge import merge
    from strategies.base_model import find

    stored = read_stored(adapter, base_digest=base.digest)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.resolve().parent) as scratch:
        yield find(str(merge(base, stored, Path(scratch, "merged"), dtype="fp32").folder))


def _new(output: Path) -> None:
    from protocol.errors import ConfigurationError

    if output.exists():
        raise ConfigurationError("command line", [f"{output}: is there already; choose another name"])
    output.resolve().parent.mkdir(parents=True, exist_ok=True)


def _signer(path: Path) -> Any:
    from protocol.signature import read_private

    return read_private(path)


def _named(adapters: Sequence[str] | None) -> dict[str, Path]:
    """By name; a folder without one is called as it is, an ``adapter`` folder as the one that it lies in."""
    from protocol.errors import ConfigurationError

    found: dict[str, Path] = {}
    for told in adapters or ():
        name, equals, folder = told.partition("=")
        path = Path(folder if equals else told).resolve()
        name = name if equals else path.parent.name if path.name == "adapter" else path.name
        if name in found:
            raise ConfigurationError("command line", [f"--adapter: two are called {name}; name them as NAME=FOLDER"])
        found[name] = path
    return found


def _bounds(told: Sequence[str] | None) -> dict[str, float]:
    from protocol.errors import ConfigurationError

    found: dict[str, float] = {}
    for each in told or ():
        name, _, number = each.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise ConfigurationError("command line", [f"--budget: found {each!r}, expected NAME=NUMBER"]) from None
    return found


def _one_of(option: str, found: str | None, known: tuple[str, ...]) -> Any:
    from protocol.errors import ConfigurationError

    if found is not None and found not in known:
        raise ConfigurationError("command line", [f"--{option}: found {found!r}, expected one of {', '.join(known)}"])
    return found


def _plan(job: Path | None, **files: Path | None) -> "Plan | None":
    """The plan of a job, without which nobody knows what is wanted of rows."""
    if job is None:
        from protocol.errors import ConfigurationError

        if wrong := [
            f"--{name} needs --job: the YAML file that says what is wanted of its rows" for name in files if files[name]
        ]:
            raise ConfigurationError("command line", wrong)
        return None
    from protocol.configuration import load
    from strategies.job import Job

    return load(job, Job).beside(job).jobs()[-1].plan()


def _say(line: str) -> None:
    typer.echo(f"· {line}", err=True)
