"""One onnxruntime session over a bundle's graph: threads, memory, and that it takes what the manifest says."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import DTypeLike, NDArray

from edge.runtime.manifest import MODEL, BundleManifest, DecoderShape
from protocol.errors import BundleError, ConfigurationError, HardwareError, ModelError, shown

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
_AROUND_BYTES = 64 * 2**20  # Python, numpy, onnxruntime and a graph's structure, measured
_MIB = 2**20
_THREADS_EACH = 4  # of a processor, at most: more only wait for each other


@dataclass(frozen=True)
class Resources:
    """What a model may take of a device.

    Attributes:
        threads: Of one call; None: every processor that this process may use.
        arena: Whether onnxruntime keeps memory that it has once had: faster, and the peak stays.
        memory_bytes: Most that the model may take; None: what is free when it is opened.
    """

    threads: int | None = None
    arena: bool = True
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        wrong = [
            f"{name}: found {value}, expected at least 1"
            for name, value in (("threads", self.threads), ("memory_bytes", self.memory_bytes))
            if value is not None and value < 1
        ]
        if self.threads is not None and self.threads > (most := _THREADS_EACH * _processors()):
            wrong.append(f"threads: found {self.threads}, expected at most {most} ({_processors()} processors are there)")
        if wrong:
            raise ConfigurationError("resources", wrong)


class Session:
    """A graph in memory; any number of threads may call it, each with a binding of its own.

    Attributes:
        dtypes: Of every input, by name.
        onnx: onnxruntime's own session.
    """

    def __init__(self, folder: Path, manifest: BundleManifest, resources: Resources) -> None:
        """Opens the graph of a bundle whose files were verified.

        Raises:
            ModelError: This onnxruntime is older than the bundle needs.
            HardwareError: There is not enough memory.
            BundleError: The graph cannot be opened, or is not what the manifest says.
        """
        check_version(manifest.minimum_onnxruntime)
        most = resources.memory_bytes
        self._left_bytes = None if most is None else most - needed_bytes(manifest)
        _check_memory(manifest, resources)
        try:
            self.onnx = onnxruntime.InferenceSession(
                str(folder / MODEL), options_of(resources), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no common class
            raise BundleError(
                f"{folder / MODEL}: onnxruntime cannot open it ({shown(str(error), 300)}); make it anew"
            ) from None
        self.dtypes: dict[str, DTypeLike] = {one.name: _DTYPES.get(one.type, np.void) for one in self._inputs()}
        self._check_graph(manifest)

    def binding(self) -> onnxruntime.IOBinding:
        """A binding of one's own: the session itself holds nothing of a call."""
        return self.onnx.io_binding()

    def run(self, binding: onnxruntime.IOBinding) -> None:
        """Runs the graph on what is bound.

        Raises:
            ModelError: onnxruntime refuses.
        """
        try:
            self.onnx.run_with_iobinding(binding)
        except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no common class
            raise ModelError(f"the graph cannot be run ({shown(str(error), 300)})") from None

    def check_room(self, cache_bytes: int, tokens: int) -> None:
        """Refuses a cache that would not fit into what is free now.

        Raises:
            HardwareError: With the numbers.
        """
        free = free_bytes() if self._left_bytes is None else self._left_bytes
        if free is not None and cache_bytes > free:
            raise HardwareError(
                f"keys and values of {tokens} tokens need {cache_bytes / _MIB:,.0f} MiB, and {free / _MIB:,.0f} MiB are there; "
                "shorten the prompt or the answer, or take fewer rows at a time"
            )

    def _inputs(self) -> Iterator[onnxruntime.NodeArg]:
        yield from self.onnx.get_inputs()
        # Those with a default: adapters.
        yield from self.onnx.get_overridable_initializers()

    def _check_graph(self, manifest: BundleManifest) -> None:
        expected = {"input_ids"}
        expected |= {f"lora.{module}.{side}" for module in manifest.lora for side in "AB"}
        expected |= {f"dense.{name}" for name in manifest.dense}
        if shape := manifest.decoder:
            if 2 * shape.layers > len(self.dtypes):  # before as many names are made as a manifest says
                raise BundleError(
                    f"{MODEL} has {len(self.dtypes)} inputs, too few for keys and values of the {shape.layers} layers that the "
                    "manifest promises; make the bundle anew"
                )
            expected |= set(past_names(shape))
            expected |= {"seqlens_k", "total_sequence_length"} if shape.cache == "in-place" else {"attention_mask"}
        else:
            expected |= {"attention_mask"}
        if missing := expected - self.dtypes.keys():
            raise BundleError(
                f"{MODEL} lacks {len(missing)} inputs that the manifest promises, such as {min(missing)}; make the bundle anew"
            )
        if strange := {name for name in expected if self.dtypes[name] is np.void}:
            raise BundleError(f"{MODEL} wants {min(strange)} in a number format that this runtime does not know")
        outputs = {one.name for one in self.onnx.get_outputs()}
        wanted = "embedding" if manifest.kind == "embedder" else "logits"
        if wanted not in outputs:
            raise BundleError(f"{MODEL} has no output {wanted}, which a {manifest.kind} must have; make the bundle anew")
        self._check_shapes(_shapes(manifest))

    def _check_shapes(self, expected: Mapping[str, Sequence[int | str]]) -> None:
        """Where the graph states a size itself; words stand for any."""
        for one in (*self._inputs(), *self.onnx.get_outputs()):
            found, wanted = one.shape, expected.get(one.name, ())
            if not found or not wanted:
                continue
            pairs = zip(found, wanted, strict=False)
            if len(found) != len(wanted) or any(isinstance(x, int) and isinstance(y, int) and x != y for x, y in pairs):
                raise BundleError(
                    f"{MODEL}: {one.name} is {shown(str(found), 100)}, and the manifest promises {list(wanted)}; make the "
                    "bundle anew"
                )


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array that takes no memory before it is written.

    Raises:
        HardwareError: It is larger than this machine can hold.
    """
    try:
        return np.zeros(shape, dtype)
    except (MemoryError, ValueError):  # ValueError: larger than any machine
        raise HardwareError(f"there is no memory for {list(shape)} numbers; take a smaller model or shorter texts") from None


def past_names(shape: DecoderShape) -> list[str]:
    """The inputs that hold keys and values of earlier tokens."""
    return [f"past.{layer}.{what}" for layer in range(shape.layers) for what in ("key", "value")]


def _shapes(manifest: BundleManifest) -> dict[str, Sequence[int | str]]:
    """What the manifest says of inputs and outputs."""
    told: dict[str, Sequence[int | str]] = {f"dense.{name}": dims for name, dims in manifest.dense.items()}
    for module, (d_in, d_out) in manifest.lora.items():
        told |= {f"lora.{module}.A": (d_in, "r"), f"lora.{module}.B": ("r", d_out)}
    if shape := manifest.decoder:
        told |= dict.fromkeys(past_names(shape), ("batch", shape.kv_heads, "capacity", shape.head_dim))
        told["logits"] = ("batch", "kept", shape.vocabulary)
    elif manifest.encoder and manifest.kind == "embedder":
        told["embedding"] = ("batch", manifest.encoder.hidden)
    return told


def free_bytes() -> int | None:
    """Memory that this process may still take; None where the system does not tell."""
    told = [_of_system(), _of_control_group()]
    return min((each for each in told if each is not None), default=None)


def needed_bytes(manifest: BundleManifest) -> int:
    """Estimate of what the model takes before its first token: weights and what is around them.

    Weights that onnxruntime lays out anew for the processor are let go of in their first form: they are held once.
    """
    weights = sum(file.size_bytes for path, file in manifest.files.items() if path.startswith(MODEL))
    if manifest.profile == "fp16":  # the processor computes in float32, and onnxruntime widens once, when it opens
        weights *= 2
    return weights * 11 // 10 + _AROUND_BYTES


def options_of(resources: Resources) -> onnxruntime.SessionOptions:
    """Settings of a session within a device's means."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = resources.threads or _processors()
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = resources.arena
    # A pattern is kept for every shape that was ever seen, and prompts have as many lengths as there are prompts.
    options.enable_mem_pattern = False
    options.log_severity_level = 4  # what goes wrong is raised as well
    return options


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_version(least: str) -> None:
    """Refuses, as ``ModelError``, an onnxruntime that is older than ``least``."""
    found = onnxruntime.__version__
    if _numbers(found) < _numbers(least):
        raise ModelError(f"the bundle needs onnxruntime {least} or newer, found {found}; pip install 'onnxruntime>={least}'")


def _numbers(version: str) -> tuple[int, ...]:
    return (*map(int, re.findall(r"\d+", version)[:3]), 0, 0)[:3]


def _check_memory(manifest: BundleManifest, resources: Resources) -> None:
    free = resources.memory_bytes or free_bytes()
    needed = needed_bytes(manifest)
    if free is not None and needed > free:
        raise HardwareError(
            f"{manifest.name} needs about {needed / _MIB:,.0f} MiB, and {free / _MIB:,.0f} MiB are there; free memory, or take "
            "a bundle of a smaller profile"
        )


def _of_system() -> int | None:
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) * 1024 if found else None
    except OSError:
        return None


def _of_control_group() -> int | None:
    """What a container's limit leaves (control groups, version 2)."""
    group = Path("/sys/fs/cgroup")
    try:
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # ValueError: "max"
        return None
