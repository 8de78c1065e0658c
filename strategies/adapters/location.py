"""A folder anywhere that fsspec reaches, whose content nobody here trusts: bounded reads, no links, files that appear whole."""

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path

from protocol.errors import AdapterError, ConfigurationError, shown

_MOST_BYTES, _BLOCK = 1 << 20, 1 << 20
_ONE_AT_A_TIME = threading.Lock()


class Location:
    """Paths are relative, with slashes. Whatever goes wrong there is an AdapterError that names the path.

    Args:
        url: For fsspec, or a folder.

    Raises:
        ConfigurationError: It is no location that fsspec knows, or needs a package that is not installed.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        if not url:
            raise ConfigurationError("location", ["found none; expected a folder or a URL, such as file:///srv/adapters"])
        try:
            self._fs, root = url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise ConfigurationError(url, [f"{error}; install that package with pip, beside fedge"]) from None
        except (ValueError, TypeError, OSError) as error:  # a TypeError where it needs more than a URL
            raise ConfigurationError(url, [f"no location that fsspec knows ({error})"]) from None
        self.url, self._root = url, root.rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)

    def inside(self, *parts: str) -> list[str]:
        """Names in a folder; none where there is no such folder."""
        path = "/".join(parts)
        with self._asking(path), suppress(FileNotFoundError, NotADirectoryError):
            found = self._fs.ls(self._at(path) if parts else self._root, detail=False)
            return [str(each).rstrip("/").rpartition("/")[2] for each in found]
        return []

    def read(self, path: str) -> bytes | None:
        """A whole file of at most 1 MiB; None where there is none."""
        raw: bytes | None = None
        with self._asking(path), suppress(FileNotFoundError), self._fs.open(self._at(path), "rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        if raw is not None and len(raw) > _MOST_BYTES:
            raise AdapterError(f"{self.url}: {path}: has more than {_MOST_BYTES} bytes; do not use it")
        return raw

    def create(self, path: str, content: bytes) -> None:
        """Writes a file whole.

        Raises:
            FileExistsError: It is there already.
        """
        with self._asking(path):
            if self._local:
                _write(Path(self._at(path)), content, os.link)
                return
            try:
                with _ONE_AT_A_TIME:  # memory:// looks before it writes
                    self._fs.pipe_file(self._at(path), content, mode="create")
            except OSError:  # s3fs says no more than that something was wrong; an answer may also have been lost on the way
                if (there := self.read(path)) is None:
                    raise
                if there != content:
                    raise FileExistsError(path) from None

    def put(self, path: str, content: bytes) -> None:
        """Writes a file whole, over one that is there."""
        with self._asking(path):
            if self._local:
                _write(Path(self._at(path)), content, os.replace)
            else:
                self._fs.pipe_file(self._at(path), content)

    def upload(self, source: Path, path: str) -> str:
        """Copies a local file there; returns the SHA-256 of what was sent."""
        sha = hashlib.sha256()
        with self._asking(path), source.open("rb") as read:
            if self._local:
                Path(self._at(path)).parent.mkdir(parents=True, exist_ok=True)
            with self._fs.open(self._at(path), "wb") as written:
                while block := read.read(_BLOCK):
                    sha.update(block)
                    written.write(block)
        return sha.hexdigest()

    def download(self, path: str, target: Path, size_bytes: int) -> str:
        """Copies a file from there to one that is not there yet, and no more than it should have; returns its SHA-256."""
        sha, left = hashlib.sha256(), size_bytes
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._asking(path), self._fs.open(self._at(path), "rb") as source, target.open("xb") as written:
            while block := source.read(min(_BLOCK, left + 1)):
                left -= len(block)
                if left < 0:
                    raise AdapterError(
                        f"{self.url}: {path}: has more than the {size_bytes} bytes that it should; do not use it"
                    )
                sha.update(block)
                written.write(block)
        if left:
            raise AdapterError(f"{self.url}: {path}: lacks {left} of the {size_bytes} bytes that it should have; do not use it")
        return sha.hexdigest()

    def remove(self, path: str) -> None:
        """Removes a file, if it is there."""
        with self._asking(path), suppress(FileNotFoundError):
            self._fs.rm_file(self._at(path))

    def discard(self, path: str) -> None:
        """Removes a folder as far as it can be removed."""
        with suppress(OSError, ValueError):
            self._fs.rm(self._at(path), recursive=True)

    def check_excludes(self) -> None:
        """Refuses places where ``create`` would write over a file that came a moment ago.

        Raises:
            ConfigurationError: This is one.
        """
        from fsspec.spec import AbstractFileSystem

        own = getattr(type(self._fs), "_pipe_file", None) or type(self._fs).pipe_file
        if not self._local and (own is AbstractFileSystem.pipe_file or "mode" not in signature(own).parameters):
            kind = type(self._fs).__name__
            raise ConfigurationError(
                self.url, [f"{kind} cannot write a file only where there is none; use file://, s3:// or gs://"]
            )

    def _at(self, path: str) -> str:
        """Where a path is; nothing on the way may be a link, which could lead out of the folder."""
        place = Path(self._root)
        for part in path.split("/") if self._local else ():
            place = place / part
            if place.is_symlink():
                raise AdapterError(f"{self.url}: {shown(path, 200)}: {shown(part, 80)} is a link; do not use it")
        return f"{self._root}/{path}"

    @contextmanager
    def _asking(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise
        except FileNotFoundError:
            raise AdapterError(f"{self.url}: {path}: is not there") from None
        except (OSError, ValueError, NotImplementedError) as error:
            raise AdapterError(f"{self.url}: {path}: {type(error).__name__}: {shown(str(error), 200)}") from None


def _write(place: Path, content: bytes, arrive: Callable[[str, Path], None]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=".", dir=place.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(draft).chmod(0o644)
        arrive(draft, place)
    finally:
        Path(draft).unlink(missing_ok=True)
