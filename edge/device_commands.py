"""Verbs of ``fedge edge`` that a device has: they need numpy, onnxruntime and tokenizers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from edge.bundle import Difference
    from edge.runtime.collecting import Collector
    from edge.runtime.manifest import BundleManifest
    from edge.runtime.model import Model
    from protocol.vault import Vault

Json = Annotated[bool, typer.Option("--json", help="One JSON line instead of text.")]
Trusted = Annotated[
    list[Path], typer.Option("--key", envvar="FEDGE_TRUSTED_KEY", help="File of public keys that are trusted; may be repeated.")
]
Bundle = Annotated[Path, typer.Argument(help="The bundle's folder.")]
AnyVersion = Annotated[
    bool, typer.Option("--any-version", help="Opens one that is older than what was opened before, and remembers nothing.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Of one answer; else every processor.")]
Own = Annotated[Path | None, typer.Option("--own", metavar="FOLDER", help="What this device has adapted, served as personal.")]
Adapter = Annotated[list[str] | None, typer.Option(help="Id of one of the bundle's, or an .onnx_adapter file.")]

Sealed = Annotated[
    Path | None,
    typer.Option(
        "--vault",
        metavar="KEYFILE",
        help="Seals what is learnt and said (fedge vault keygen makes it; a passphrase in FEDGE_VAULT_PASSPHRASE).",
    ),
]

_COLUMNS = 80


def mount(edge: typer.Typer, update: typer.Typer) -> None:
    """Adds the verbs to ``fedge edge`` and ``fedge edge update``."""
    for verb in (verify, inspect, diff, run, serve, latency):
        edge.command()(verb)
    update.command("apply")(apply)


def verify(
    bundle: Bundle,
    key: Trusted,
    lowest_version: Annotated[int, typer.Option(min=0, help="Older ones are refused.")] = 0,
    name: Annotated[str | None, typer.Option(help="The one bundle that is expected.")] = None,
    as_json: Json = False,
) -> None:
    """Checks that every byte of a bundle is as a trusted key signed it; opens nothing."""
    from edge.runtime.verify import verified

    manifest = verified(bundle, trusted(key), lowest_version=lowest_version, name=name)
    tell(facts(bundle, manifest), [f"{bundle}: every byte of {_title(manifest)} is as it was signed"], as_json)


def inspect(bundle: Bundle, key: Trusted, as_json: Json = False) -> None:
    """Shows what a bundle says of itself: what it was made from, its adapters, how far it is from PyTorch."""
    from edge.runtime.verify import signed_manifest

    manifest, _, _ = signed_manifest(bundle, trusted(key))
    tell(manifest.model_dump(mode="json"), [*summary(bundle, manifest), *_details(manifest)], as_json)


def diff(
    old: Annotated[Path, typer.Argument(help="A bundle.")],
    new: Annotated[Path, typer.Argument(help="Another one.")],
    key: Trusted,
    as_json: Json = False,
) -> None:
    """Compares what two bundles say of themselves: what changed, what an update would carry. ``verify`` reads their files."""
    from dataclasses import asdict

    from edge.bundle import difference
    from edge.runtime.verify import signed_manifest

    keys = trusted(key)
    (before, _, _), (after, _, _) = signed_manifest(old, keys), signed_manifest(new, keys)
    made = difference(before, after)
    lines = [f"{_title(before)} → {_title(after)}: an update is {made.update_bytes:,} of {made.whole_bytes:,} bytes"]
    lines.append("  as both manifests are signed; the files themselves were not read")
    tell(asdict(made), [*lines, *changes(made)], as_json)


def apply(
    bundle: Bundle,
    update: Annotated[Path, typer.Argument(help="The update, from anywhere.")],
    output: Annotated[Path, typer.Argument(help="New folder for the next version, beside the bundle.")],
    key: Trusted,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copies unchanged files too; else both bundles share them on the disk.")
    ] = False,
    any_version: AnyVersion = False,
    as_json: Json = False,
) -> None:
    """Makes the next version of the bundle that is here; the old one stays as it is."""
    from edge.runtime.opened_versions import FOLDER
    from edge.runtime.update import apply_update

    state = None if any_version else output.resolve().parent / FOLDER
    manifest = apply_update(bundle, update, output, trusted(key), state=state, copies=copy)
    tell(facts(output, manifest), [f"{output}: {_title(manifest)}, every byte as it was signed"], as_json)


def run(
    bundle: Bundle,
    texts: Annotated[list[str], typer.Argument(help="Questions to answer, or texts to classify or embed.")],
    key: Trusted,
    adapter: Adapter = None,
    compare: Annotated[bool, typer.Option("--compare", help="The base answers beside the adapters.")] = False,
    system: Annotated[str | None, typer.Option(help="System message before each question.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Goes on from each text, without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Of the draw; 0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draws among the k likeliest tokens; 0 among all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draws among the likeliest tokens of this probability together.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens that stand there already are less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    own: Own = None,
    vault: Sealed = None,
    threads: Threads = None,
    any_version: AnyVersion = False,
    as_json: Json = False,
) -> None:
    """Answers, classifies or embeds with each adapter that is named; with the base where none is."""
    model = _opened(bundle, key, adapter or [], threads, any_version, own, vault)
    whose: dict[str, str | None] = {} if model.adapters and not compare else {"base": None}
    whose |= {name: name for name in model.adapters}
    if model.manifest.kind == "decoder":
        said: list[Any] = [text if plain else _conversation(system, text) for text in texts]
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "stop": tuple(stop or ()),
            "seed": seed,
        }
        told = {who: [one.text for one in model.generate_all(said, adapter=name, **settings)] for who, name in whose.items()}
        tell({"questions": texts, "answers": told}, _lines(texts, told), as_json)
    elif model.manifest.kind == "classifier":
        found = {who: model.classify(texts, adapter=name) for who, name in whose.items()}
        labels = {who: one.labels for who, one in found.items()}
        likely = {who: [float(row.max()) for row in one.probabilities] for who, one in found.items()}
        shown = {who: [f"{label} ({p:.1%})" for label, p in zip(labels[who], likely[who], strict=True)] for who in found}
        tell({"texts": texts, "labels": labels, "probabilities": likely}, _lines(texts, shown), as_json)
    else:
        vectors = {who: model.embed(texts, adapter=name) for who, name in whose.items()}
        shown = {who: [f"{len(row)} numbers, first {row[0]:.4f}" for row in rows] for who, rows in vectors.items()}
        tell(
            {"texts": texts, "embeddings": {who: rows.tolist() for who, rows in vectors.items()}}, _lines(texts, shown), as_json
        )


def serve(
    bundle: Bundle,
    key: Trusted,
    adapter: Annotated[list[str] | None, typer.Option(help="Adapters to serve beside the base; else all.")] = None,
    address: Annotated[str, typer.Option(help="IP address; any but this machine's own needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    token_env: Annotated[str | None, typer.Option(help="Environment variable with the token that clients send.")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Answers that are written at once.")] = 1,
    waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait for their turn.")] = 16,
    own: Own = None,
    collects: Annotated[
        Path | None,
        typer.Option("--feedback", metavar="FOLDER", help="Keeps there, sealed, what users say of answers with store: true."),
    ] = None,
    vault: Sealed = None,
    threads: Threads = None,
    any_version: AnyVersion = False,
) -> None:
    """Serves the bundle to clients of OpenAI's API on this machine: chat, completions, embeddings. Ctrl-C ends it."""
    import logging
    from contextlib import suppress

    from edge.runtime.listening import Settings
    from edge.runtime.server import BundleServer

    settings = Settings(address=address, port=port, token=_token(token_env), parallel=parallel, waiting=waiting)
    model = _opened(bundle, key, adapter, threads, any_version, own, vault)
    collector = _collector(bundle, model, collects, vault) if collects else None
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    with BundleServer(model, settings, collector) as server, suppress(KeyboardInterrupt):
        typer.echo(f"{server.url} serves {', '.join(server.names)} of {_title(model.manifest)}; Ctrl-C ends", err=True)
        server.serve_forever()


def latency(
    bundle: Bundle,
    key: Trusted,
    adapter: Adapter = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of a prompt of random tokens.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Of its answer; an encoder writes none.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Of which the median is told.")] = 3,
    threads: Threads = None,
    any_version: AnyVersion = False,
    as_json: Json = False,
) -> None:
    """Measures the bundle on this device: time to the first token, tokens per second, peak memory."""
    from edge.runtime.latency import measure

    model = _opened(bundle, key, adapter or [], threads, any_version)
    report = measure(model, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats)
    typer.echo(report.to_json() if as_json else report.table())


def _collector(bundle: Path, model: "Model", folder: Path, vault: Path | None) -> "Collector":
    from edge.runtime.adapting.feedback import Store, screen_of
    from edge.runtime.collecting import Collector

    return Collector(Store(folder, vault_of(vault)), screen_of(bundle, model.manifest))


def vault_of(key_file: Path | None) -> "Vault":
    """The vault that a verb needs."""
    from edge.runtime.adapting.sealing import vault_at
    from protocol.errors import ConfigurationError

    if key_file is None:
        problem = "feedback and replayed rows are never written in the clear; expected --vault KEYFILE (fedge vault keygen)"
        raise ConfigurationError("command line", [f"vault: {problem}"])
    return vault_at(key_file)


def existing(folder: Path, maker: str = "adapt") -> Path:
    """A folder of what was learnt, or said, if there is one; ``maker`` is the verb that makes it."""
    from protocol.errors import DataError

    if not folder.is_dir():
        raise DataError(f"{folder}: is no folder; fedge edge {maker} makes it, or name another")
    return folder


def trusted(paths: Sequence[Path]) -> "list[Ed25519PublicKey]":
    """The keys of all files."""
    from protocol.signature import read_trusted

    return [key for path in paths for key in read_trusted(path)]


def tell(told: Mapping[str, Any], lines: Sequence[str], as_json: bool) -> None:
    """Prints one or the other."""
    for line in [json.dumps(told, ensure_ascii=False)] if as_json else lines:
        typer.echo(line)


def facts(folder: Path, manifest: "BundleManifest") -> dict[str, Any]:
    """What a program that reads the output wants to know of a bundle."""
    told = manifest.model_dump(mode="json", include={"name", "version", "kind", "profile", "base_model", "parity"})
    return {"bundle": str(folder), "size_bytes": manifest.size_bytes, "adapters": sorted(manifest.adapters), **told}


def summary(folder: Path, manifest: "BundleManifest") -> list[str]:
    """What its maker wants to see of a bundle."""
    from edge.report import written

    lines = [f"{folder}: {_title(manifest)}, {manifest.kind} of {manifest.base_model}, {manifest.size_bytes / 1e6:,.1f} MB"]
    for name, figures in manifest.parity.items():
        shares = {"KL": figures.kl, "top-1": figures.top1, "cosine": figures.cosine}
        told = [f"largest difference {written(figures.largest_logit_difference)}"]
        told += [f"{what} {written(value)}" for what, value in shares.items() if value is not None]
        told += [f"{what} {written(before)} → {written(after)}" for what, (before, after) in figures.metrics.items()]
        lines += _folded(f"  {name}: {', '.join(told)}")
    return lines + [line for remark in manifest.remarks for line in _folded(f"  note: {remark}")]


def _folded(line: str) -> list[str]:
    return wrap(line, _COLUMNS, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def changes(made: "Difference") -> list[str]:
    """What changed, a line for each kind of it."""
    kinds = {"added": made.added, "changed": made.changed, "removed": made.removed, "described otherwise": made.described}
    return [f"  {kind}: {', '.join(paths)}" for kind, paths in kinds.items() if paths]


def _details(manifest: "BundleManifest") -> list[str]:
    shape = manifest.decoder or manifest.encoder
    context = f"{shape.context_tokens:,} tokens of context, " if shape else ""
    lines = [f"  {context}opset {manifest.opset}, onnxruntime {manifest.minimum_onnxruntime} or newer"]
    lines.append(f"  base {manifest.base_digest[:12]}, {len(manifest.lora)} modules take LoRA")
    if manifest.kind == "decoder":
        lines.append(f"  chat template: {manifest.chat_remark or 'yes' if manifest.chat else f'none, {manifest.chat_remark}'}")
    for name, adapter in manifest.adapters.items():
        labels = f", {len(adapter.labels)} labels" if adapter.labels else ""
        lines.append(f"  adapter {name}: {adapter.method}, rank {adapter.r}{labels}, {adapter.digest[:12]}")
    return lines + [f"  {path}: {file.size_bytes:,} bytes, {file.sha256[:12]}" for path, file in manifest.files.items()]


def _title(manifest: "BundleManifest") -> str:
    return f"{manifest.name} version {manifest.version} ({manifest.profile})"


def _opened(
    bundle: Path,
    key: Sequence[Path],
    adapters: Sequence[str] | None,
    threads: int | None,
    any_version: bool,
    own: Path | None = None,
    vault: Path | None = None,
) -> "Model":
    """The model with its adapters, all of the bundle's where none are named; and with the device's own."""
    from edge.runtime.model import open as opened
    from edge.runtime.opened_versions import FOLDER
    from edge.runtime.session import Resources

    state = None if any_version else Path(FOLDER)
    model = opened(bundle, trusted(key), state=state, resources=Resources(threads=threads))
    for name in model.manifest.adapters if adapters is None else adapters:
        model.load_adapter(name)
    if own is not None:
        _use(model, bundle, own, vault)
    return model


def _use(model: "Model", bundle: Path, own: Path, vault: Path | None) -> None:
    """What a device has learnt; a device that learns nothing loads nothing of that."""
    from edge.runtime.adapting.adapt import PERSONAL, in_use
    from edge.runtime.adapting.sealing import seal_of

    seal = seal_of(own, vault_of(vault) if vault else None)
    if found := in_use(bundle, model.manifest, existing(own), seal):
        model.use_adapter(PERSONAL, found[0], labels=found[1])


def _token(variable: str | None) -> str | None:
    import os

    from protocol.errors import ConfigurationError

    if variable is None:
        return None
    found = os.environ.get(variable)
    if not found:
        raise ConfigurationError("environment", [f"{variable}: holds no token; set what --token-env names beforehand"])
    return found


def _conversation(system: str | None, question: str) -> list[dict[str, str]]:
    said = [] if system is None else [{"role": "system", "content": system}]
    return [*said, {"role": "user", "content": question}]


def _lines(texts: Sequence[str], told: Mapping[str, Sequence[str]]) -> list[str]:
    """Each text, and below it what everyone makes of it."""
    return [
        line for at, text in enumerate(texts) for line in (f"? {text}", *(f"  {who}: {each[at]}" for who, each in told.items()))
    ]
