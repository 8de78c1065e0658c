"""One training graph in memory, and its runs on tensors that stay where they are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import onnxruntime

from edge.runtime.manifest import BundleManifest
from edge.runtime.session import Resources, options_of
from edge.runtime.verify import content
from protocol.errors import BundleError, ModelError, shown

WEIGHT: Final = "weight."
LEVELS, SCALES = "levels.", "scales."
Value: TypeAlias = onnxruntime.OrtValue
Values = Mapping[str, Value]


class TrainingGraph:
    """A graph; for one thread.

    Attributes:
        inputs: Shape of each by name; sizes that are free are words.
        outputs: Names.
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self.inputs: dict[str, list[Any]] = {one.name: one.shape for one in session.get_inputs()}
        self.outputs = [one.name for one in session.get_outputs()]

    def modules(self) -> dict[str, tuple[int, int]]:
        """``(d_in, d_out)`` of what takes factors, by name in the graph."""
        found = {}
        for name, shape in self.inputs.items():
            if name.startswith("lora.") and name.endswith(".A"):
                module = name.removeprefix("lora.").removesuffix(".A")
                found[module] = int(shape[1]), int(self.inputs[f"lora.{module}.B"][0])
        return found

    def weights(self) -> dict[str, list[Any]]:
        """Shapes of the parameters that it takes, by name in the graph."""
        return {name.removeprefix(WEIGHT): shape for name, shape in self.inputs.items() if name.startswith(WEIGHT)}

    def integers(self) -> dict[str, list[Any]]:
        """Shapes ``(d_in, d_out)`` of the parameters that it takes as integers, by name in the graph."""
        return {name.removeprefix(LEVELS): shape for name, shape in self.inputs.items() if name.startswith(LEVELS)}

    def run(self, given: Values, wanted: Sequence[str]) -> dict[str, Value]:
        """Outputs by name.

        Args:
            given: Inputs by name; what the graph has no input for is left out.
            wanted: Names of outputs.

        Raises:
            ModelError: onnxruntime refuses.
        """
        if not wanted:
            return {}
        feeds = {name: given[name] for name in self.inputs}
        try:
            told = self._session.run_with_ort_values(list(wanted), feeds)
        except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no common class
            raise ModelError(f"a training graph cannot be run ({shown(str(error), 300)})") from None
        return dict(zip(wanted, told, strict=True))


def opened(folder: Path, manifest: BundleManifest, path: str, resources: Resources) -> onnxruntime.InferenceSession:
    """A session over one file of a bundle, from the bytes that were checked.

    Raises:
        BundleError: It is not as it was signed, or onnxruntime cannot open it.
    """
    held = content(folder, manifest, path)
    options = options_of(resources)
    # Runs alternate between graphs: what one of them keeps for its next run, the others lack.
    options.enable_cpu_mem_arena = False
    try:
        return onnxruntime.InferenceSession(held, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no common class
        raise BundleError(f"{folder / path}: onnxruntime cannot open it ({shown(str(error), 300)}); make it anew") from None
