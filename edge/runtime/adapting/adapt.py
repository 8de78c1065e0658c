"""A device adapts its bundle to its own rows: one call, in a budget, kept only if better on rows that never trained."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge.runtime import gradient
from edge.runtime.adapters import read as read_adapter
from edge.runtime.adapters import tensors
from edge.runtime.adapting.budget import Budget, Meter, Senses
from edge.runtime.adapting.learning import Learning, Learnt, Settings, Watch, new_adapter
from edge.runtime.adapting.passes import Figures
from edge.runtime.adapting.personal import Personal, Version, on_top
from edge.runtime.adapting.rows import Examples, RowReader
from edge.runtime.adapting.state import Seal, Trail, alone_in
from edge.runtime.manifest import TOKENIZER, BundleManifest, adapter_path
from edge.runtime.session import Resources
from edge.runtime.tokens import Tokeniser
from edge.runtime.verify import content
from protocol.adapter import Adapter
from protocol.errors import AdapterError, ConfigurationError, shown

log = logging.getLogger(__name__)
PERSONAL: Final = "personal"  # as which adapted adapters are served
_SETTINGS: Final = Settings()
_BUDGET: Final = Budget()
_RESOURCES: Final = Resources()


@dataclass(frozen=True)
class Device:
    """Where a device keeps what it learns, and what it may take.

    Attributes:
        folder: Of its adapters and of an unfinished training; for its owner's eyes alone.
        seal: Where files are to be sealed.
        resources: Threads and memory.
        senses: What it knows of itself.
    """

    folder: Path
    seal: Seal | None = None
    resources: Resources = _RESOURCES
    senses: Senses | None = None


@dataclass(frozen=True)
class Adapted:
    """What came of it.

    Attributes:
        version: Under which the new adapter is in use; None where the one before stays.
        why: Why it is kept or not.
        learnt: The training.
    """

    version: int | None
    why: str
    learnt: Learnt

    def told(self) -> dict[str, Any]:
        """As JSON tells it: figures, and no row."""
        learnt = self.learnt
        return {
            "version": self.version,
            "why": self.why,
            "steps": learnt.steps,
            "ended": learnt.ended,
            "stopped": learnt.stopped,
            "before": asdict(learnt.before),
            "after": asdict(learnt.after),
            "forgot": [asdict(each) for each in learnt.forgot] if learnt.forgot else None,
            "said": learnt.said,
        }


def adapt(
    bundle: Path,
    data: Sequence[Mapping[str, Any]],
    budget: Budget = _BUDGET,
    *,
    trusted: Ed25519PublicKey | Sequence[Ed25519PublicKey] | Path | str,
    device: Device,
    settings: Settings = _SETTINGS,
    adapter: str | None = None,
    beneath: bool = False,
    labels: Sequence[str] = (),
    replay: Sequence[Mapping[str, Any]] = (),
    watch: Watch = lambda step, loss: None,
) -> Adapted:
    """Learns from rows; what is in use changes only if the new adapter is better on held-back rows.

    Args:
        bundle: With training graphs (``fedge edge export --trainable``).
        data: Rows (``edge.runtime.adapting.rows``).
        budget: What it may take. Where it runs out, the training goes on at the next call with the same rows and settings.
        trusted: Whose signature of the bundle counts.
        device: Where it keeps what it learns.
        settings: How it learns.
        adapter: One of the bundle's, to begin from where the device has none of its own yet.
        beneath: That adapter stays as it is, and one of the device's own is trained on top of it.
        labels: Of the classifier's rows; empty: the adapter's, or the base's own.
        replay: Rows of what it is not to forget.
        watch: Told of each step and its loss.

    Raises:
        BundleError: It does not hold, or has no training graphs.
        DataError: A row cannot be learnt from.
        AdapterError: No such adapter, or it does not fit what the graphs hold.
        ConfigurationError: Settings beyond what the graphs hold.
        DivergenceError: The loss is no number any more; the adapter in use stays.
        HardwareError: No room for the state; ``NotNowError`` where another process learns in the device's folder.
    """
    bundle = Path(bundle)
    with closing(gradient.open(bundle, trusted, resources=device.resources)) as found, alone_in(device.folder):
        manifest = found.manifest
        own = Personal(device.folder, device.seal)
        now, said = _goes_on(own, manifest, settings, (adapter or "") if beneath else "")
        named = _labels(manifest, labels, adapter, now)
        given = _bundled(bundle, manifest, adapter) if adapter else None
        frozen = given if beneath else None
        start = now.adapter if now else (given if given is not None and not beneath else new_adapter(found, settings))
        _check_rank(settings, found.largest_rank)
        tokens = Tokeniser(content(bundle, manifest, TOKENIZER), manifest.tokens)
        reader = RowReader(manifest, tokens, found.largest_tokens, named)
        examples = reader.examples(data)
        learning = Learning(
            found,
            examples,
            settings,
            start,
            trail := Trail(device.folder, device.seal),
            frozen=frozen,
            replay=_same(reader.examples(replay, "replay"), examples) if replay else None,
            watch=watch,
        )
        meter = Meter(budget, device.senses)
        said += [f"{name}: this device does not tell it; no limit on it is kept" for name in meter.unknown()]
        learnt = learning.run(meter)
        said += [f"{examples.dropped} rows left nothing to learn"] if examples.dropped else []
        said += [f"{examples.cut} rows were longer than {found.largest_tokens} tokens and were cut"] if examples.cut else []
        learnt = replace(learnt, said=[*said, *learnt.said])
        used = learning.held_back(now.adapter) if now else learnt.before
        kept, why = _verdict(learnt, used, settings, measured=learning.has_held_out)
        version = None
        if kept:
            figures = {"before": asdict(used), "after": asdict(learnt.after), "steps": learnt.steps, "labels": list(named)}
            told = {
                "bundle": f"{manifest.name} {manifest.version}",
                "base_digest": manifest.base_digest,
                "beneath": (adapter or "") if beneath else "",
            }
            version = own.keep(learnt.adapter, told | figures)
        if learnt.ended:
            trail.forget()
        return Adapted(version, why, learnt)


def in_use(
    bundle: Path, manifest: BundleManifest, folder: Path, seal: Seal | None = None
) -> tuple[Adapter, tuple[str, ...]] | None:
    """The adapter that a device uses in place of the bundle's, on top of what it was trained on, and its labels; None: none.

    Raises:
        AdapterError: It was made for another base, or on top of an adapter that this bundle has not.
    """
    found, wrong = Personal(folder, seal).current()
    for line in wrong:
        log.warning("%s: %s", folder, line)
    if found is None:
        return None
    if found.facts.get("base_digest") != manifest.base_digest:
        raise AdapterError(f"{folder}: version {found.number} was made for another base; roll back, or adapt this bundle anew")
    beneath = str(found.facts.get("beneath") or "")
    below = _bundled(bundle, manifest, beneath) if beneath else Adapter()
    return on_top(below, found.adapter), tuple(found.facts.get("labels") or ())


def _goes_on(own: Personal, manifest: BundleManifest, settings: Settings, beneath: str) -> tuple[Version | None, list[str]]:
    """The version that is trained on, and what its user should know.

    Raises:
        ConfigurationError: It was learnt on top of another adapter: figures of the two could not be compared.
    """
    now, said = own.current()
    if now is None:
        return None, said
    if now.facts.get("base_digest") != manifest.base_digest:
        return None, [*said, f"version {now.number} was made for another base; a new adapter is begun"]
    if (was := str(now.facts.get("beneath") or "")) != beneath:
        mended = f"give --adapter {shown(was, 100)} --beneath" if was else "leave --beneath out"
        raise ConfigurationError(
            "adapt", [f"beneath: version {now.number} has another adapter beneath it; {mended}, or roll back"]
        )
    ranks = set(now.adapter.ranks().values())
    if "r" in settings.model_fields_set and ranks - {settings.r}:
        said.append(f"r: {settings.r} is of a new adapter; version {now.number} goes on with rank {max(ranks)}")
    return now, said


def _verdict(learnt: Learnt, used: Figures, settings: Settings, *, measured: bool) -> tuple[bool, str]:
    if not learnt.steps:
        return False, "no step was taken"
    if not measured:
        return True, "kept unmeasured: no row was held back"
    if not learnt.after.loss < used.loss:  # NaN is none better
        return False, f"no better on held-back rows: loss {learnt.after.loss:.4g}, in use {used.loss:.4g}"
    if learnt.forgot and settings.most_forgetting is not None:
        before, after = learnt.forgot
        if not after.loss <= before.loss * (1 + settings.most_forgetting):
            return False, f"forgets too much: loss on replayed rows {after.loss:.4g}, before {before.loss:.4g}"
    return True, f"better on held-back rows: loss {learnt.after.loss:.4g}, in use {used.loss:.4g}"


def _bundled(bundle: Path, manifest: BundleManifest, name: str) -> Adapter:
    if name not in manifest.adapters:
        there = ", ".join(sorted(manifest.adapters)[:20]) or "none"
        raise AdapterError(f"{shown(name, 100)}: no adapter of this bundle, which has {there}")
    content(bundle, manifest, adapter_path(name))
    dtypes = {f"lora.{module}.{side}": "float32" for module in manifest.lora for side in "AB"}
    dtypes |= {f"dense.{name}": "float32" for name in manifest.dense}
    return tensors(read_adapter(bundle / adapter_path(name), manifest, dtypes, manifest.adapters[name].labels))


def _labels(manifest: BundleManifest, asked: Sequence[str], adapter: str | None, now: Version | None) -> tuple[str, ...]:
    """Of the classifier's rows: those of the adapter that is trained on."""
    listed = manifest.adapters.get(adapter or "")
    known = tuple(now.facts.get("labels") or ()) if now else (listed.labels if listed else ()) or manifest.labels
    if asked and len(asked) != len(known):
        raise ConfigurationError("adapt", [f"labels: found {len(asked)}; the head that is trained has {len(known)}"])
    return tuple(asked) or known


def _check_rank(settings: Settings, most: int) -> None:
    if settings.r > most:
        raise ConfigurationError("adapt", [f"r: found {settings.r}; the bundle's training graphs hold at most {most}"])


def _same(replay: Examples, examples: Examples) -> Examples:
    if replay.task != examples.task:
        raise ConfigurationError(
            "adapt", [f"replay: rows for {replay.task} beside rows for {examples.task}; give the same kind"]
        )
    return replay
