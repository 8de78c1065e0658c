"""What a few real steps on this machine show, kept so that later estimates of memory and time are corrected by it.

The steps are taken in a process of their own, by the same ``fit`` that trains: what another training left behind is not
measured, and running out of memory ends that process and not this one. Kept are numbers and the name of the base; nothing of
it leaves the machine. The file is ``calibration.json`` in ``$FEDGE_CACHE``, or in ``fedge`` in the user's cache folder; it may
hold several machines (a home folder that they share), and each reads its own.
"""

import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from protocol.configuration import parse
from protocol.data_settings import DataSettings
from protocol.errors import ConfigurationError, FedgeError, HardwareError
from protocol.files import write_whole
from protocol.plan import QUANTISED, Plan
from protocol.strict import Strict
from protocol.training_settings import TrainingSettings
from strategies import architecture as architectures
from strategies import cost, footprint, memory
from strategies.base_model import EMBEDDED, Base, find, load_tokenizer
from strategies.data import encode, formats
from strategies.hardware import Hardware, Rates, Type, probe
from strategies.memory import Setup

log = logging.getLogger(__name__)
# Batches of another size weigh the parts of the memory otherwise, so an estimate is not lowered further than this.
_LEAST_MEMORY = 0.9
_WORD = "the"


# Beyond these no machine measures anything: the file is damaged, and what is computed of it might not be a number.
Measured = Annotated[float, Field(ge=1e-9, le=1e9)]
Size = Annotated[int, Field(ge=1, le=2**50)]
Rate = Annotated[float, Field(ge=1e3, le=1e21)]


class Point(Strict):
    """What one plan's steps showed.

    Attributes:
        device: Of whom.
        method: As in ``memory.Setup``.
        precision: How the base was held and computed.
        checkpointing: Layers were computed again.
        base: Its name, as the plan called it.
        day: When, ``YYYY-MM-DD``.
        seconds: Of an optimizer step, the middle one.
        estimated_seconds: By the device's rates.
        bytes: Peak of a step above what was in use before the model was made; None where the system does not say.
        estimated_bytes: ``memory.Estimate.peak_bytes``.
    """

    device: str
    method: str
    precision: str
    checkpointing: bool
    base: str
    day: str
    seconds: Measured
    estimated_seconds: Measured
    bytes: Size | None
    estimated_bytes: Size

    @property
    def key(self) -> tuple[str, str, bool]:
        """Trainings that it speaks of."""
        return self.method, self.precision, self.checkpointing


class MeasuredRates(Strict):
    """Rates of a device that no datasheet was read for."""

    bandwidth: Rate
    flops: dict[Type, Rate]
    day: str

    @model_validator(mode="after")
    def _single_precision(self) -> "MeasuredRates":
        if "fp32" not in self.flops:
            raise ValueError("flops of fp32 are missing, which every device computes in")
        return self

    def rates(self, device: str) -> Rates:
        """As the cost is estimated from."""
        return Rates(self.bandwidth, self.flops, f"measured on {device}, {self.day}")


class _Kept(Strict):
    """The file."""

    version: Literal[1] = 1
    rates: dict[str, MeasuredRates] = Field(default_factory=dict)
    points: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """What was measured on this machine.

    Attributes:
        device: Its GPU, or its CPU and cores.
        kind: Which of the two.
        points: Every plan that was measured, the newest of each kind and base.
        rates: Of the device where no datasheet is known for it (every CPU); None where one is.
    """

    device: str
    kind: Literal["cuda", "cpu"]
    points: tuple[Point, ...]
    rates: Rates | None

    @property
    def source(self) -> str:
        """Where and when."""
        return f"{self.device}, {max(point.day for point in self.points)}"

    def time_factor(self, setup: Setup) -> float | None:
        """Measured over estimated seconds: of trainings like this one, else of all of them here; None on another device.

        A factor for one method alone would make the methods that were not measured look faster or slower than they are.
        """
        if setup.device != self.kind:
            return None
        return _mean([point.seconds / point.estimated_seconds for point in self._alike(setup) or self.points])

    def memory_factor(self, setup: Setup) -> float | None:
        """Measured over estimated bytes, the largest of trainings like this one; None where none was measured.

        Not below 0.9: rows of another number or length weigh the parts otherwise.
        """
        if setup.device != self.kind:
            return None
        factors = [point.bytes / point.estimated_bytes for point in self._alike(setup) if point.bytes]
        return max(_LEAST_MEMORY, *factors) if factors else None

    def _alike(self, setup: Setup) -> list[Point]:
        return [point for point in self.points if point.key == (setup.method, _precision(setup), setup.gradient_checkpointing)]


def read_calibration(file: Path | None = None) -> Calibration | None:
    """What was kept of this machine; None where nothing was, or where the file is damaged (which is logged).

    Args:
        file: Another than the user's own.
    """
    file = file or cache_file()
    kept = _read(file)
    if not kept.points:
        return None
    device, kind = device_of(probe())
    return _of(kept, device, kind)


def cache_file() -> Path:
    """Where calibrations are kept."""
    named = os.environ.get("FEDGE_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(named) if named else user / "fedge") / "calibration.json"


def calibrate(plan: Plan, base: Base | None = None, *, steps: int = 4, file: Path | None = None) -> Calibration:
    """Takes a few real steps of a plan here, on rows of its longest length, and keeps what they showed.

    Args:
        plan: What is going to be trained; its data paths are not looked at.
        base: Its base; without it ``plan.base_model`` is looked for.
        steps: Optimizer steps that are timed, after one that is not.
        file: Where it is kept; the user's cache by default.

    Raises:
        HardwareError: The steps do not fit this machine.
        ModelError: The base is not here, or cannot do what the plan asks.
        ConfigurationError: The plan and this machine do not go together.
    """
    base, file = base or find(plan.base_model), file or cache_file()
    hardware = probe()
    device, kind = device_of(hardware)
    machine = footprint.Machine.of(hardware).one
    architecture = architectures.read(str(base.folder))
    setup = footprint.setup_of(plan, architecture, machine)
    estimated = memory.estimate(architecture, setup).peak_bytes
    kept = _read(file)
    known = machine.rates or (kept.rates[device].rates(device) if device in kept.rates else None)
    found = _in_another_process(plan, base, steps, rates=known is None)
    today = datetime.now(UTC).date().isoformat()
    if known is None:
        measured = MeasuredRates(bandwidth=found["bandwidth"], flops=found["flops"], day=today)
        kept = kept.model_copy(update={"rates": {**kept.rates, device: measured}})
        known = measured.rates(device)
    point = Point(
        device=device,
        method=setup.method,
        precision=_precision(setup),
        checkpointing=setup.gradient_checkpointing,
        base=plan.base_model,
        day=today,
        seconds=found["seconds"],
        estimated_seconds=_step_seconds(plan, architecture, setup, known),
        bytes=found["bytes"],
        estimated_bytes=estimated,
    )
    others = [p for p in kept.points if (p.device, p.key, p.base) != (point.device, point.key, point.base)]
    kept = kept.model_copy(update={"points": (*others, point)})
    write_whole(file, kept.model_dump_json(indent=2))
    made = _of(kept, device, kind)
    assert made is not None  # noqa: S101 - it holds the point that was just measured
    return made


def _of(kept: _Kept, device: str, kind: Literal["cuda", "cpu"]) -> Calibration | None:
    points = tuple(point for point in kept.points if point.device == device)
    rates = kept.rates[device].rates(device) if device in kept.rates else None
    return Calibration(device, kind, points, rates) if points else None


def _read(file: Path) -> _Kept:
    try:
        return parse(json.loads(file.read_text(encoding="utf-8")), _Kept, source=str(file))
    except FileNotFoundError:
        return _Kept()
    except ConfigurationError as error:
        reason = error.problems[0]
    except (OSError, ValueError, RecursionError) as error:
        reason = f"not readable as JSON ({type(error).__name__})"
    log.warning("%s is left out: %s; fedge plan --calibrate writes it anew", file, reason)
    return _Kept()


def device_of(hardware: Hardware) -> tuple[str, Literal["cuda", "cpu"]]:
    """What a calibration of this machine speaks of: the first GPU's name, or the CPU's with its cores."""
    if hardware.gpus:
        return hardware.gpus[0].name, "cuda"
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # no Linux: the shorter name will do
    return f"{name}, {hardware.cpu_cores} cores", "cpu"


def _precision(setup: Setup) -> str:
    held = setup.base_dtype if setup.quantization == "none" else setup.quantization
    return held if setup.mixed_precision == "none" else f"{held}, autocast {setup.mixed_precision}"


def _step_seconds(plan: Plan, architecture: architectures.Architecture, setup: Setup, rates: Rates) -> float:
    return cost.estimate(
        architecture,
        setup,
        rates,
        steps=1,
        accumulation=plan.training.gradient_accumulation_steps,
        completion=plan.rl.max_completion_length if plan.objective == "rl" else None,
    ).step_seconds


def _mean(factors: Sequence[float]) -> float | None:
    return math.exp(statistics.fmean(map(math.log, factors))) if factors else None


# In a process of its own ----------------------------------------------------------------------------------------------


def _in_another_process(plan: Plan, base: Base, steps: int, *, rates: bool) -> dict[str, Any]:
    asked = {"plan": plan.model_dump(mode="json") | {"base_model": str(base.folder)}, "steps": steps, "rates": rates}
    paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    answer = subprocess.run(
        [sys.executable, "-m", "strategies.calibration"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    if answer.returncode < 0:
        raise HardwareError(f"a real step ended by signal {-answer.returncode}, most likely out of memory; take a smaller plan")
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        raise HardwareError(f"a real step failed: {last}; try fedge train with this plan")
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    if "error" in found:
        raise HardwareError(f"a real step failed: {found['error']}")
    return found


def main() -> None:
    """Measures what standard input asks for, and answers on the last line of standard output."""
    asked = json.load(sys.stdin)
    plan = parse(asked["plan"], Plan, source="plan")
    try:
        found = measure(plan, find(plan.base_model), asked["steps"]) | (measure_rates() if asked["rates"] else {})
    except FedgeError as error:
        found = {"error": str(error)}
    sys.stdout.write(json.dumps(found) + "\n")


def measure(plan: Plan, base: Base, steps: int = 4) -> dict[str, Any]:
    """Seconds of an optimizer step, and bytes at its peak, in this process.

    Args:
        plan: What is trained; every row has its largest length.
        base: Its base.
        steps: That are timed, after one that is not.
    """
    import gc

    from torch.optim.optimizer import register_optimizer_step_post_hook

    from strategies.training import fit

    batches = plan.training.batch_size * plan.training.gradient_accumulation_steps
    rows = rows_of(plan, base, 2 * batches)
    fit(*_warming(plan))  # threads, kernels and code are not the model's
    gc.collect()
    watch = _Watch(_status("VmRSS"))
    hook = register_optimizer_step_post_hook(watch)
    short = {"max_steps": steps + 1, "eval_steps": None, "save_steps": None, "early_stopping_patience": None}
    try:
        fit(plan.model_copy(update={"training": plan.training.model_copy(update=short)}), base, rows)
    finally:
        hook.remove()
    return {"seconds": watch.seconds(), "bytes": watch.peak}


class _Watch:
    """Called at the end of every optimizer step: when that was, and the most memory since the first."""

    def __init__(self, before: int) -> None:
        import torch

        self._cuda = torch.cuda if torch.cuda.is_available() else None
        self._before, self._ends = before, list[float]()
        self.peak: int | None = None

    def __call__(self, *_: Any) -> None:
        if self._cuda:
            self._cuda.synchronize()
        if not self._ends:  # loading the model is not a step
            self._begin()
        elif self._cuda:
            self.peak = self._cuda.max_memory_allocated()
        elif most := _status("VmHWM"):
            self.peak = max(1, most - self._before)
        self._ends.append(time.perf_counter())

    def seconds(self) -> float:
        """Of the middle step.

        Raises:
            HardwareError: Fewer than two steps were taken.
        """
        if len(self._ends) < 2:
            raise HardwareError("no step was taken to its end; expected finite gradients within a few steps")
        return statistics.median(b - a for a, b in zip(self._ends, self._ends[1:], strict=False))

    def _begin(self) -> None:
        if self._cuda:
            self._cuda.reset_peak_memory_stats()
        elif sys.platform.startswith("linux"):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM from here on


def rows_of(plan: Plan, base: Base, count: int) -> list[formats.Row]:
    """Rows for a plan's objective that fill its ``data.max_length`` with a word; of what was really meant nothing is read."""
    tokenizer, most = load_tokenizer(base), plan.data.max_length
    prompt = ({"role": "user", "content": _WORD},)
    long = " ".join([_WORD] * most)  # cut to the length

    def fitting(tokens: Callable[[str], Sequence[int]], room: int) -> str:
        words = room
        while words > 1 and len(tokens(" ".join([_WORD] * words))) > room:
            words = min(words - 1, int(words * 0.95))
        return " ".join([_WORD] * words)

    def row(at: int) -> formats.Row:
        match plan.objective:
            case "classification":
                return formats.LabelledText(long, at % len(plan.data.labels or (0, 0)))
            case "regression":
                return formats.ScoredText(long, at % 2)
            case "pretraining":
                return formats.PlainText(long)
            case "dpo":
                return formats.Preference(prompt, long, f"a {long}")
            case "kto":
                return formats.Feedback(prompt, long, at % 2 == 0)
            case "reward":
                answer = fitting(lambda text: encode.answered_ids(prompt, f"a {text}", tokenizer), most)
                return formats.Preference(prompt, answer, f"a {answer}")
            case "rl":
                room = max(8, most - plan.rl.max_completion_length)
                asked = fitting(lambda text: encode.prompt_ids(({"role": "user", "content": text},), tokenizer), room)
                return formats.Prompt(({"role": "user", "content": asked},))
            case _:
                return formats.Conversation(prompt, long)

    return [row(at) for at in range(count)]


def _warming(plan: Plan) -> tuple[Plan, Base, list[formats.Row]]:
    """A step of the tiny model in the same arithmetic."""
    base = find(EMBEDDED)
    alike = plan.training.model_dump(include={"gradient_checkpointing", "optim", "mixed_precision"})
    made = Plan(
        base_model=EMBEDDED,
        method="qlora" if plan.precision in QUANTISED else "lora",
        precision=plan.precision,
        data=DataSettings(max_length=16),
        training=TrainingSettings(max_steps=1, batch_size=1, **alike),
    )
    return made, base, rows_of(made, base, 1)


def measure_rates() -> dict[str, Any]:
    """How fast this device multiplies large matrices and copies memory; a second or so."""
    import torch

    cuda = torch.cuda.is_available()
    device, side, copied = ("cuda", 4096, 2**28) if cuda else ("cpu", 1024, 2**25)

    def best(run: Callable[[], object]) -> float:
        taken = []
        for _ in range(5):
            begun = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - begun)
        return min(taken)

    flops = {}
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16} if cuda else {"fp32": torch.float32}
    for name, kind in kinds.items():
        matrix = torch.ones(side, side, dtype=kind, device=device)
        flops[name] = 2 * side**3 / best(partial(torch.matmul, matrix, matrix))
    source, target = (torch.ones(copied // 4, device=device) for _ in range(2))
    return {"flops": flops, "bandwidth": 2 * copied / best(lambda: target.copy_(source))}


def _status(key: str) -> int:
    """Bytes that Linux says of this process; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


if __name__ == "__main__":
    main()
