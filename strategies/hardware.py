"""What this machine has: GPUs, cores, memory, disk, and how fast they nominally are. The only file that asks drivers.

Works with no GPU, no driver and no torch. Nothing found here ever leaves the machine. A machine can be described in place of
being asked: by a named profile, or by a number of GPUs of some memory.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

from protocol.errors import ConfigurationError

Kernel = Literal["nf4", "int8", "optimizers"]
Type = Literal["fp32", "fp16", "bf16"]
_GIB = 2**30
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": _GIB,
    "TIB": 2**40,
}
_QUERY = "index,uuid,name,memory.total,memory.free,compute_cap"


@dataclass(frozen=True)
class Rates:
    """Rates of a device: nominal ones from its datasheet, and what of them is really reached.

    Attributes:
        bandwidth: Of its memory, bytes a second.
        flops: Dense floating-point operations a second by type, without sparsity; 16-bit ones accumulate in float32.
        source: Where the figures stand.
        achieved: Shares of these rates that large matrix products were measured to reach: power and clocks hold boards below
            their datasheets, the T4 most. 1 for a type that is not in it.
        watts: Of the board at its limit; None where it is not known.
        link: To another GPU, bytes a second in one direction.
    """

    bandwidth: float
    flops: Mapping[Type, float]
    source: str
    achieved: Mapping[Type, float] = field(default_factory=dict)
    watts: float | None = None
    link: float = 32e9


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: As the driver calls it.
        total_bytes: Memory.
        free_bytes: What other processes have left.
        compute_capability: Of CUDA, as (major, minor); (0, 0) where it is not known.
        rates: None for a GPU that the table does not hold.
    """

    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    rates: Rates | None = None

    @property
    def bf16(self) -> bool:
        """Has bfloat16 tensor cores (Ampere and later)."""
        return self.compute_capability >= (8, 0)

    @property
    def bitsandbytes(self) -> frozenset[Kernel]:
        """Kernels that bitsandbytes has for it (its installation guide): 4 bits from Pascal on, int8 from Turing on."""
        known: dict[Kernel, tuple[int, int]] = {"nf4": (6, 0), "optimizers": (6, 0), "int8": (7, 5)}
        return frozenset(kernel for kernel, least in known.items() if self.compute_capability >= least)


@dataclass(frozen=True)
class Hardware:
    """A machine.

    Attributes:
        gpus: In the order of the driver; empty without any.
        cpu_cores: That this process may use.
        ram_total_bytes: Of the machine, or of the container that limits it.
        ram_free_bytes: That can be had without swapping.
        disk_free_bytes: In the working directory.
    """

    gpus: tuple[Gpu, ...]
    cpu_cores: int
    ram_total_bytes: int
    ram_free_bytes: int
    disk_free_bytes: int


def probe(folder: Path | None = None) -> Hardware:
    """Asks this machine.

    Args:
        folder: Whose disk is meant; the working directory by default.
    """
    total, free = _ram()
    return Hardware(_gpus(), _cores(), total, free, shutil.disk_usage(folder or Path.cwd()).free)


def override(
    hardware: Hardware, *, profile: str | None = None, gpu_memory: str | None = None, gpus: int | None = None
) -> Hardware:
    """The same machine as if it had other GPUs, or another machine by its name.

    Args:
        hardware: What was probed; its cores, memory and disk stay unless a profile names a whole machine.
        profile: One of ``PROFILES``.
        gpu_memory: Of each GPU, such as ``24GB`` (10**9) or ``24GiB`` (2**30).
        gpus: How many; 0 for none.

    Raises:
        ConfigurationError: Every value that cannot be used.
    """
    if problems := conflicts(profile=profile, gpu_memory=gpu_memory, gpus=gpus):
        raise ConfigurationError("hardware", problems)
    size = None if gpu_memory is None else parse_bytes(gpu_memory)
    made = PROFILES[profile] if profile is not None else hardware
    if profile is not None and made.gpus:
        made = replace(hardware, gpus=made.gpus)
    if size is None and gpus is None:
        return made
    if gpus and size is None and not made.gpus:
        where = "this machine" if profile is None else profile
        raise ConfigurationError("hardware", [f"gpus: found {gpus}, and {where} has none to go by; give gpu_memory too"])
    first = made.gpus[0] if made.gpus else Gpu("described", 0, 0, (8, 0))
    if size is not None:
        first = replace(first, total_bytes=size, free_bytes=size)
    return replace(made, gpus=(first,) * (gpus if gpus is not None else max(1, len(made.gpus))))


def conflicts(*, profile: str | None = None, gpu_memory: str | None = None, gpus: int | None = None) -> list[str]:
    """Every value of an override that cannot be used, whatever machine it is of."""
    problems = []
    if profile is not None and profile not in PROFILES:
        problems.append(f"profile: found {profile!r}, expected one of {', '.join(PROFILES)}")
    if gpus is not None and (isinstance(gpus, bool) or not 0 <= gpus <= 1024):
        problems.append(f"gpus: found {gpus}, expected 0 to 1024")
    try:
        size = None if gpu_memory is None else parse_bytes(gpu_memory)
    except ValueError as error:
        problems.append(f"gpu_memory: {error}")
        size = None
    if size is not None and not 2**28 <= size <= 2**42:
        problems.append(f"gpu_memory: found {gpu_memory}, expected 256MiB to 4TiB")
    if gpu_memory is not None and gpus == 0:
        problems.append("gpu_memory: given with gpus 0; leave out one of the two")
    return problems


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``24GB``, ``1.5 GiB`` or ``500000``.

    Raises:
        ValueError: It is no size.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([a-zA-Z]{0,3})\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"found {text!r}, expected a number and a unit, such as 24GB or 24GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def rates_of(name: str) -> Rates | None:
    """Nominal rates by the name that a driver reports; None when the table does not hold it."""
    words = name.upper().replace("-", " ").split()
    variant = {"TI", "SUPER", "LAPTOP", "MAX"} & set(words)  # other chips under the same number
    for key, rates in _RATES.items():
        if all(word in words for word in key.split()) and not variant:
            return rates
    return None


def _gpus() -> tuple[Gpu, ...]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    asked = [command, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()  # the command without a driver that answers: no GPU that could be used
    return _visible([line.split(", ") for line in answer.splitlines()], os.environ.get("CUDA_VISIBLE_DEVICES"))


def _visible(rows: Sequence[Sequence[str]], wanted: str | None) -> tuple[Gpu, ...]:
    """The GPUs of nvidia-smi's rows; of those only what ``CUDA_VISIBLE_DEVICES`` leaves, up to the first it does not know."""
    known = {}
    for row in rows:
        if len(row) != len(_QUERY.split(",")):
            continue
        index, uuid, name, total, free, capability = (cell.strip() for cell in row)
        try:
            major, _, minor = capability.partition(".")
            gpu = Gpu(name, int(total) * 2**20, int(free) * 2**20, (int(major), int(minor or 0)), rates_of(name))
        except ValueError:
            continue  # a GPU that does not say ("[N/A]"): it cannot be planned for
        known[index] = known[uuid] = gpu
    if wanted is None:
        return tuple(gpu for key, gpu in known.items() if key.isdigit())
    chosen = []
    for key in (part.strip() for part in wanted.split(",")):
        found = known.get(key) or next((gpu for full, gpu in known.items() if key and full.startswith(key)), None)
        if found is None:
            break
        chosen.append(found)
    return tuple(chosen)


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]):
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def _ram() -> tuple[int, int]:
    """Total and available bytes, of the container where that is less."""
    lines = dict(line.partition(":")[::2] for line in _read("/proc/meminfo").splitlines())
    try:
        total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (KeyError, ValueError, IndexError):
        page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
        total = page * os.sysconf("SC_PHYS_PAGES") if page else 0
        free = total
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        total = min(total, int(limit))
        free = min(free, max(0, int(limit) - int(used)))
    return total, free


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _nominal(
    bandwidth_gb: float,
    half_tera: float,
    single_tera: float,
    watts: float,
    source: str,
    *,
    measured_tera: float | None = None,
    link_gb: float = 32,
    bf16: bool = True,
) -> Rates:
    half = {"fp16": half_tera * 1e12, "bf16": half_tera * 1e12} if bf16 else {"fp16": half_tera * 1e12}
    flops: Mapping[Type, float] = cast("Mapping[Type, float]", {"fp32": single_tera * 1e12, **half})
    share = measured_tera / half_tera if measured_tera else _UNMEASURED
    return Rates(
        bandwidth_gb * 1e9,
        flops,
        source,
        {kind: _SINGLE if kind == "fp32" else share for kind in flops},
        watts,
        link_gb * 1e9,
    )


# Where no measurement was found: the median of those below. Float32 outside tensor cores: 14 of 15.7 TFLOP/s on a V100
# (github.com/mli/transformers-benchmarks).
_UNMEASURED, _SINGLE = 0.85, 0.89
_ADA, _AMPERE = "NVIDIA Ada GPU architecture whitepaper", "NVIDIA Ampere GA102 whitepaper"
# Words of the driver's name -> rates; the more specific name first. The nominal ones were held against public copies of the
# datasheets in November 2026 (dense, float32 accumulation: half of what is advertised "with sparsity", and on GeForce half of
# what accumulates in float16). ``measured_tera`` are matrix products as others measured them: S. Bekman, Machine Learning
# Engineering (github.com/stas00/ml-engineering, compute/accelerator), and github.com/mag-/gpu_benchmark; the T4 at its power
# limit, forums.developer.nvidia.com/t/264462. Links: NVLink where the board has it, else PCI Express with its lanes.
_RATES: Mapping[str, Rates] = {
    "B200": _nominal(8000, 2250, 80, 1000, "NVIDIA HGX B200 datasheet", measured_tera=1745, link_gb=900),
    "H200": _nominal(4800, 989, 67, 700, "NVIDIA H200 datasheet", measured_tera=794.5, link_gb=450),
    "H100 PCIE": _nominal(2000, 756, 51, 350, "NVIDIA H100 datasheet", measured_tera=499.5, link_gb=64),
    "H100 NVL": _nominal(3900, 835, 60, 400, "NVIDIA H100 datasheet", measured_tera=488.5, link_gb=300),
    "H100": _nominal(3350, 989, 67, 700, "NVIDIA H100 datasheet", measured_tera=794.5, link_gb=450),
    "A100 80GB PCIE": _nominal(1935, 312, 19.5, 300, "NVIDIA A100 datasheet", measured_tera=252.9),
    "A100 80GB": _nominal(2039, 312, 19.5, 400, "NVIDIA A100 datasheet", measured_tera=271.2, link_gb=300),
    "A100 PCIE": _nominal(1555, 312, 19.5, 250, "NVIDIA A100 datasheet", measured_tera=252.9),
    "A100": _nominal(1555, 312, 19.5, 400, "NVIDIA A100 datasheet", measured_tera=271.2, link_gb=300),
    "L40S": _nominal(864, 362, 91.6, 350, "NVIDIA L40S datasheet", measured_tera=252),
    "L40": _nominal(864, 181, 90.5, 300, "NVIDIA L40 datasheet", measured_tera=170.3),
    "L4": _nominal(300, 121, 30.3, 72, "NVIDIA L4 datasheet", measured_tera=91.4, link_gb=16),
    "A10G": _nominal(600, 70, 35, 300, "NVIDIA A10G datasheet (AWS G5)", measured_tera=69.7),
    "A10": _nominal(600, 125, 31.2, 150, "NVIDIA A10 datasheet"),
    "A40": _nominal(696, 149.7, 37.4, 300, "NVIDIA A40 datasheet"),
    "A6000": _nominal(768, 154.8, 38.7, 300, "NVIDIA RTX A6000 datasheet", measured_tera=131.2),
    "V100": _nominal(900, 125, 15.7, 300, "NVIDIA V100 datasheet", measured_tera=95, link_gb=150, bf16=False),
    "T4": _nominal(320, 65, 8.1, 70, "NVIDIA T4 datasheet", measured_tera=24, link_gb=16, bf16=False),
    "RTX 5090": _nominal(1792, 209.5, 104.8, 575, "NVIDIA RTX Blackwell whitepaper", link_gb=64),
    "RTX 4090": _nominal(1008, 165.2, 82.6, 450, _ADA, measured_tera=178.8),
    "RTX 4060": _nominal(272, 30.2, 15.1, 115, _ADA, link_gb=16),
    "RTX 3090": _nominal(936, 71, 35.6, 350, _AMPERE, measured_tera=78),
    "RTX 3060": _nominal(360, 25.5, 12.7, 170, _AMPERE),
}


def _described(name: str, mebibytes: int, capability: tuple[int, int]) -> Hardware:
    gpu = Gpu(name, mebibytes * 2**20, mebibytes * 2**20, capability, rates_of(name))
    return Hardware((gpu,), 0, 0, 0, 0)


# GPU profiles (memory as nvidia-smi reports it) leave cores, memory and disk as they are; laptop and phone are whole machines.
PROFILES: Mapping[str, Hardware] = {
    "h200": _described("NVIDIA H200", 143_771, (9, 0)),
    "h100": _described("NVIDIA H100 80GB HBM3", 81_559, (9, 0)),
    "a100-80gb": _described("NVIDIA A100-SXM4-80GB", 81_920, (8, 0)),
    "a100-40gb": _described("NVIDIA A100-SXM4-40GB", 40_960, (8, 0)),
    "l40s": _described("NVIDIA L40S", 46_068, (8, 9)),
    "l4": _described("NVIDIA L4", 23_034, (8, 9)),
    "a10g": _described("NVIDIA A10G", 23_028, (8, 6)),
    "v100": _described("Tesla V100-SXM2-16GB", 16_384, (7, 0)),
    "t4": _described("Tesla T4", 15_360, (7, 5)),
    "rtx-4090": _described("NVIDIA GeForce RTX 4090", 24_564, (8, 9)),
    "rtx-3090": _described("NVIDIA GeForce RTX 3090", 24_576, (8, 6)),
    "rtx-3060": _described("NVIDIA GeForce RTX 3060", 12_288, (8, 6)),
    "rtx-4060": _described("NVIDIA GeForce RTX 4060", 8_188, (8, 9)),
    # A business laptop of 2023: 8 cores, 16 GB, of which an operating system leaves about 10.
    "laptop-cpu": Hardware((), 8, 16 * _GIB, 10 * _GIB, 100 * _GIB),
    # A phone of 2023 with 8 GB: Android lets one process have about a quarter of it.
    "phone": Hardware((), 4, 8 * _GIB, 2 * _GIB, 16 * _GIB),
}
