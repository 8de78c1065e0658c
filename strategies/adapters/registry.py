"""A registry of adapters on any fsspec location: versions that never change, what they came from, tags, retention.

    LOCATION/
      NAME/
        versions/3.json     what version 3 is: digest of every file, lineage; a version is there when this is
        files/<drawn>/      the files of one version
        tags/production     the version that a tag names
        removed/2           says that there was a version 2

Files are written first, under a name of their own, and the version last, by one operation that fails where it is there already:
a publisher that dies leaves nothing that can be seen, and of two that publish the same version one is told. Whoever removes
(``prune``) first takes the version away and then looks whether anything has come to refer to it, and whoever refers (a tag, a
child) first writes and then looks whether it is still there; so at least one of two that meet sees the other.

What is fetched is held against its digests, and nothing of a location is trusted before: names, sizes, links, JSON.
"""

import json
import re
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from protocol.errors import AdapterError, shown
from protocol.files import read_stored, whole_folder
from protocol.plan import Plan
from strategies.adapters.location import Location
from strategies.adapters.version import DRAWN, NAME, NUMBER, Figures, File, Lineage, Version, described, lineage_of, sources

LATEST = "latest"
LESS_IS_BETTER = frozenset({"loss", "perplexity", "ece", "brier", "mae", "mse", "rmse"})
_ABANDONED_SECONDS = 86_400  # files without a version that are older were left by a publisher that died


@dataclass(frozen=True)
class Pruned:
    """What ``prune`` did.

    Attributes:
        removed: Versions that are gone.
        kept: By version beyond the newest, what refers to it.
    """

    removed: tuple[str, ...]
    kept: Mapping[str, str]


class Registry:
    """Adapters at one location.

    Args:
        location: An fsspec URL (``file:///srv/adapters``, ``s3://bucket/adapters``, ``memory://adapters``) or a folder.

    Raises:
        ConfigurationError: It is no location that fsspec knows, or needs a package that is not installed.
    """

    def __init__(self, location: str) -> None:
        self._location = Location(location)
        self.location = location

    # What is there ------------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Adapters that have a version or had one."""
        return sorted(name for name in self._location.inside() if re.fullmatch(NAME, name))

    def versions(self, name: str) -> list[str]:
        """Versions of an adapter, oldest first: ordered by their numbers."""
        found = (
            file.removesuffix(".json") for file in self._location.inside(_name(name), "versions") if file.endswith(".json")
        )
        return sorted((version for version in found if re.fullmatch(NUMBER, version)), key=_order)

    def tags(self, name: str) -> dict[str, str]:
        """Version by tag; ``latest`` is the newest."""
        found = {}
        for tag in self._location.inside(_name(name), "tags"):
            if re.fullmatch(NAME, tag) and tag != LATEST and (version := self._tagged(name, tag)):
                found[tag] = version
        newest = self.versions(name)[-1:]
        return {**dict.fromkeys([LATEST] if newest else [], "".join(newest)), **found}

    def leading(self, name: str, figure: str = "loss") -> tuple[str, float, int] | None:
        """The version with the best value of a figure, that value, and on how many rows; None where no version has one.

        Only versions that were measured on as many rows as the newest measured one are compared: others were on other rows.
        """
        found = (self._found(name, version) for version in self.versions(_name(name)))
        measured = [(one, one.figures) for one in found if one and one.figures and figure in one.figures.values]
        values = [(one.version, told.values[figure], told.rows) for one, told in measured]
        sign = 1 if figure.rpartition("/")[2] in LESS_IS_BETTER else -1
        return min((each for each in values if each[2] == values[-1][2]), key=lambda each: sign * each[1], default=None)

    def show(self, reference: str) -> Version:
        """One version.

        Args:
            reference: NAME (its latest), NAME@NUMBER or NAME@TAG.

        Raises:
            AdapterError: There is none, or what describes it is damaged.
        """
        name, _, wanted = reference.partition("@")
        _name(name)
        if not re.fullmatch(NUMBER, wanted):
            tag, tags = wanted or LATEST, self.tags(name)
            if tag not in tags:
                known = ", ".join(sorted(tags)) or "none"
                raise AdapterError(f"{self.location}: {shown(reference, 200)}: no such version or tag; tags are {known}")
            wanted = tags[tag]
        return self._read(name, wanted)

    # What changes it ----------------------------------------------------------------------------------------------------

    def publish(
        self,
        folder: Path,
        name: str,
        version: str | None = None,
        *,
        base_digest: str | None = None,
        parents: Sequence[str] = (),
        data_card: Path | None = None,
        plan: Plan | None = None,
        figures: Figures | None = None,
    ) -> Version:
        """Publishes an adapter's folder with all files in it.

        Args:
            folder: As ``fedge train`` writes it, or plain PEFT.
            name: Letters, digits, hyphens and underscores.
            version: One to four numbers with dots; without it the next whole number.
            base_digest: Of the base; needed where the folder has no manifest.
            parents: NAME, NAME@NUMBER or NAME@TAG of what it was made from.
            data_card: A file whose digest is kept.
            plan: That it was trained with; its paths are left out.
            figures: What was measured of it.

        Returns:
            The version; the one that is there already if it is equal to the byte.

        Raises:
            AdapterError: The folder holds no adapter or a link, the version is there with other content, or a parent is not.
        """
        _name(name)
        if version is not None and not re.fullmatch(NUMBER, version):
            raise AdapterError(
                f"version {shown(version, 80)!r}: expected one to four whole numbers with dots, such as 3 or 1.2.0"
            )
        self._location.check_excludes()
        stored, found = read_stored(folder), sources(folder)
        lineage = lineage_of(stored, base_digest, [self.show(parent).reference for parent in parents], data_card, plan)
        files = {path: described(source) for path, source in found.items()}
        there = self.versions(name)
        if version is None and there and (newest := self._same(name, there[-1], files, lineage, figures)):
            return newest
        if version in self._location.inside(name, "removed"):
            raise AdapterError(f"{self.location}: {name}@{version} was removed, and versions do not come back; name a new one")
        drawn = f"{int(time.time())}-{secrets.token_hex(8)}"
        made = Version(
            name=name,
            version=version or _next(there),
            folder=drawn,
            files=files,
            lineage=lineage,
            published_seconds=int(time.time()),
            figures=figures,
        )
        if version in there:
            return self._equal(made)
        try:
            for path, source in found.items():
                if self._location.upload(source, f"{name}/files/{drawn}/{path}") != files[path].sha256:
                    raise AdapterError(f"{source}: changed while it was published; publish it again")
        except BaseException:
            self._location.discard(f"{name}/files/{drawn}")
            raise
        # From here on the version may be there even if the answer gets lost: its files stay (and are swept if it is not).
        kept = self._enter(made, again=version is None)
        if kept.folder != drawn:
            self._location.discard(f"{name}/files/{drawn}")
        return kept

    def fetch(self, reference: str, target: Path) -> Version:
        """Copies a version's files to a new folder, each held against its digest.

        Raises:
            AdapterError: There is no such version, something of it is damaged or no adapter, or the target is there.
        """
        if target.exists():
            raise AdapterError(f"{target}: is there already; name a new folder")
        found = self.show(reference)
        with whole_folder(target) as draft:
            for path, file in found.files.items():
                place = f"{found.name}/files/{found.folder}/{path}"
                if self._location.download(place, draft / path, file.size_bytes) != file.sha256:
                    raise AdapterError(
                        f"{self.location}: {found.reference}: {path} is not what was published (its digest differs); publish "
                        "it again, under a new version"
                    )
            stored = read_stored(draft, base_digest=found.lineage.base_digest)
            if stored.adapter.digest() != found.lineage.adapter_digest:
                raise AdapterError(f"{self.location}: {found.reference}: holds another adapter than it says; do not use it")
        return found

    def tag(self, reference: str, tag: str, *, remove: bool = False) -> str:
        """Points a tag to a version, or takes it away; returns the version.

        Raises:
            AdapterError: There is no such version, it does not bear the tag that is to go, or the tag is ``latest``, which the
                newest version has by itself.
        """
        if tag == LATEST or not re.fullmatch(NAME, tag):
            raise AdapterError(
                f"tag {shown(tag, 80)!r}: expected letters, digits, hyphens; {LATEST} is the newest version's own"
            )
        found = self.show(reference)
        place = f"{found.name}/tags/{tag}"
        if remove:
            was = self._tagged(found.name, tag)
            if was is None or ("@" in reference and was != found.version):
                raise AdapterError(f"{self.location}: {shown(reference, 200)} does not bear the tag {tag}; name what does")
            self._location.remove(place)
            return was
        self._location.put(place, found.version.encode())
        if found.version not in self.versions(found.name):
            raise AdapterError(f"{self.location}: {found.reference} was removed meanwhile; tag another version")
        return found.version

    def prune(self, keep: int, names: Sequence[str] = ()) -> Pruned:
        """Removes old versions, and what publishers that died have left.

        Kept are the newest ``keep`` of each name, those that a tag names, and all that a kept one comes from, of any name.

        Args:
            keep: At least 1.
            names: Only of these; without it of all.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}; expected 1 or more")
        there = self._all()
        held = self._held(there, {f"{n}@{v}" for n in names or self.names() for v in self.versions(n)[:-keep]})
        victims = {reference: version for reference, version in there.items() if reference not in held}
        for version in victims.values():
            self._location.remove(_place(version))
        # What was tagged or published on one of them meanwhile brings it back, and what it came from itself.
        late = self._held(self._all() | victims, victims.keys())
        for reference in victims.keys() & late.keys():
            with suppress(FileExistsError):
                self._location.create(_place(victims[reference]), _written(victims[reference]))
        gone = sorted(victims.keys() - late.keys())
        for version in (victims[reference] for reference in gone):
            self._location.put(f"{version.name}/removed/{version.version}", b"")
            self._location.discard(f"{version.name}/files/{version.folder}")
        for name in names or self.names():
            self._sweep(name)
        return Pruned(tuple(gone), {reference: why for reference, why in (late | held).items() if why})

    # Parts --------------------------------------------------------------------------------------------------------------

    def _all(self) -> dict[str, Version]:
        found = (self._found(name, version) for name in self.names() for version in self.versions(name))
        return {version.reference: version for version in found if version}

    def _held(self, there: Mapping[str, Version], old: Collection[str]) -> dict[str, str]:
        """Versions that stay: those that are not old, and of the old ones those that something refers to, with what it is."""
        held = dict.fromkeys(there.keys() - set(old), "")
        tagged = {f"{name}@{version}": f"tag {tag}" for name in self.names() for tag, version in self.tags(name).items()}
        held |= {reference: why for reference, why in tagged.items() if reference in there and reference not in held}
        ahead = list(held)
        while ahead:
            child = ahead.pop()
            for parent in there[child].lineage.parents:
                if parent in there and parent not in held:
                    held[parent] = f"parent of {child}"
                    ahead.append(parent)
        return held

    def _sweep(self, name: str) -> None:
        """Removes files that belong to no version and are too old to be on their way."""
        before = int(time.time()) - _ABANDONED_SECONDS
        old = [
            drawn
            for drawn in self._location.inside(name, "files")
            if re.fullmatch(DRAWN, drawn) and int(drawn.partition("-")[0]) < before
        ]
        if old:
            used = {version.folder for version in self._all().values() if version.name == name}
            for drawn in set(old) - used:
                self._location.discard(f"{name}/files/{drawn}")

    def _enter(self, made: Version, *, again: bool) -> Version:
        """Makes a version seen; with ``again`` at the next number where another publisher was faster."""
        while True:
            try:
                self._location.create(_place(made), _written(made))
            except FileExistsError:
                if not again:
                    return self._equal(made)
                made = made.model_copy(update={"version": _next(self.versions(made.name))})
                continue
            gone = [p for p in made.lineage.parents if p.partition("@")[2] not in self.versions(p.partition("@")[0])]
            if gone:
                self._location.remove(_place(made))
                raise AdapterError(
                    f"{self.location}: {', '.join(gone)} was removed meanwhile; publish without it, or from another"
                )
            return made

    def _equal(self, made: Version) -> Version:
        there = self._same(made.name, made.version, made.files, made.lineage, made.figures)
        if there is None:
            raise AdapterError(
                f"{self.location}: {made.reference} is there with other content, and versions do not change; publish it as "
                f"{_next(self.versions(made.name))}"
            )
        return there

    def _same(
        self, name: str, version: str, files: Mapping[str, File], lineage: Lineage, figures: Figures | None
    ) -> Version | None:
        there = self._read(name, version)
        return there if (there.files, there.lineage, there.figures) == (dict(files), lineage, figures) else None

    def _read(self, name: str, version: str) -> Version:
        found = self._found(name, version)
        if found is None:
            there = ", ".join(self.versions(name)) or "none"
            raise AdapterError(f"{self.location}: {name}@{version}: no such version; there are {there}")
        return found

    def _found(self, name: str, version: str) -> Version | None:
        what = f"{self.location}: {name}@{version}"
        raw = self._location.read(f"{name}/versions/{version}.json")
        if raw is None:
            return None
        try:
            found = Version.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = shown(".".join(map(str, first["loc"])), 120)
            raise AdapterError(
                f"{what}: what describes it is damaged ({where or 'JSON'}: {shown(first['msg'], 200)})"
            ) from None
        if (found.name, found.version) != (name, version):
            raise AdapterError(f"{what}: what describes it is of {found.reference}; do not use it")
        return found

    def _tagged(self, name: str, tag: str) -> str | None:
        raw = self._location.read(f"{name}/tags/{tag}")
        if raw is None:
            return None
        version = raw.decode("ascii", "replace")
        if not re.fullmatch(NUMBER, version):
            raise AdapterError(
                f"{self.location}: tag {tag} of {name} names {shown(version, 80)!r}, which is no version; set it again"
            )
        return version


def _name(name: str) -> str:
    if not re.fullmatch(NAME, name):
        raise AdapterError(f"name {shown(name, 80)!r}: expected letters, digits, hyphens and underscores, at most 64")
    return name


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def _next(versions: Sequence[str]) -> str:
    return str(_order(versions[-1])[0] + 1 if versions else 1)


def _place(version: Version) -> str:
    return f"{version.name}/versions/{version.version}.json"


def _written(version: Version) -> bytes:
    told = version.model_dump(mode="json", exclude=None if version.figures else {"figures"})
    return json.dumps(told, indent=2, sort_keys=True).encode()
