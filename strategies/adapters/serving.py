"""One base in memory, any number of adapters over it, of any method: each has layers of its own around the base's tensors.

A copy of a model's modules that shares their tensors costs nothing; an adapter is attached to such a view. What a method
changes in the base itself (BitFit, full, a head) is copied for its view first. Nothing of one adapter reaches another or the
base, and to switch is to choose a view. LoRA adapters can also answer side by side, in one batch (PEFT's ``adapter_names``).
"""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol.errors import AdapterError
from protocol.files import Stored, write_adapter
from protocol.manifest import Manifest
from protocol.plan import ON_THE_BASE, QUANTISED, Plan
from strategies.adapted import attached, with_adapter
from strategies.base_model import Base
from strategies.generation import greedy
from strategies.methods.frozen_base import prepared
from strategies.methods.registry import shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Served:
    """A base with adapters that answer by name.

    Args:
        plan: Of objective sft; its precision holds the base.
        base: Loaded once, here.
    """

    def __init__(self, plan: Plan, base: Base) -> None:
        self._plan, self._base = plan, base
        self._model, self._tokenizer = with_adapter(plan, base, None)
        self._ground: PreTrainedModel | None = None
        self._views: dict[str, Any] = {}
        self._side_by_side: dict[str, Stored] = {}
        self._batch: Any = None

    def add(self, name: str, stored: Stored) -> None:
        """Attaches an adapter under a name; in place of the one that had it.

        Raises:
            AdapterError: It does not fit the base or the task.
            ConfigurationError: Its method does not go with the base's precision.
        """
        plan = stored.on(self._plan)
        view = _view(self._prepared())
        _own(view, _changed(self._base, plan))
        self._views[name] = attached(view, plan, stored.adapter)
        self._batch = None
        self._side_by_side.pop(name, None)
        if stored.settings["method"] == "lora" and stored.adapter.factors and not stored.adapter.dense:
            self._side_by_side[name] = stored

    def answer(self, name: str | None, questions: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers of one adapter, or of the base (None), one question at a time."""
        model = self._model if name is None else self._views[name]
        return greedy(model, self._tokenizer, questions, max_new_tokens)

    def answer_together(self, asked: Sequence[tuple[str | None, str]], max_new_tokens: int) -> list[str]:
        """Greedy answers to questions for several adapters, in one batch: each row goes through its own.

        Args:
            asked: Adapter's name (None for the base) and question.
            max_new_tokens: Longest answer.

        Raises:
            AdapterError: One of the adapters is no plain LoRA, for which PEFT has such batches.
        """
        if odd := sorted({name for name, _ in asked if name is not None and name not in self._side_by_side}):
            raise AdapterError(
                f"{', '.join(odd)}: no plain LoRA that was added; a batch of several adapters takes LoRA without DoRA and "
                "without modules that train whole; ask one adapter at a time"
            )
        numbers = {name: f"adapter-{at}" for at, name in enumerate(self._side_by_side)}
        names = ["__base__" if name is None else numbers[name] for name, _ in asked]
        if self._batch is None and self._side_by_side:
            self._batch = self._together(numbers)
        questions = [question for _, question in asked]
        if self._batch is None:
            return greedy(self._model, self._tokenizer, questions, max_new_tokens)
        return greedy(self._batch, self._tokenizer, questions, max_new_tokens, len(asked), adapter_names=names)

    def _together(self, numbers: dict[str, str]) -> Any:
        """One model of PEFT with every LoRA of those that were added."""
        from peft import PeftModel

        made: Any = None
        with tempfile.TemporaryDirectory(prefix="fedge-") as scratch:
            for name, stored in self._side_by_side.items():
                folder = Path(scratch, numbers[name])
                plan = stored.on(self._plan)
                known = shape(self._base, plan).embeddings
                manifest = Manifest(base_digest=self._base.digest, kind="adapter", embeddings=known)
                write_adapter(folder, stored.adapter, manifest, plan)
                if made is None:
                    made = PeftModel.from_pretrained(_view(self._prepared()), str(folder), adapter_name=numbers[name])
                else:
                    made.load_adapter(str(folder), adapter_name=numbers[name])
        return made.eval()

    def _prepared(self) -> "PreTrainedModel":
        """What adapters are attached to: a quantised base is made ready once, with float tensors of its own."""
        if self._plan.precision not in QUANTISED:
            return self._model
        if self._ground is None:
            view = _view(self._model)
            _own(view, {name for name, tensor in view.named_parameters() if tensor.is_floating_point()})
            self._ground = prepared(view, self._plan).eval()
        return self._ground


def _view(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model's modules anew, around the same tensors."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    # What bitsandbytes keeps beside a quantised weight belongs to the weight.
    states = (state for module in model.modules() if (state := getattr(module, "state", None)) is not None)
    return copy.deepcopy(model, {**shared, **{id(state): state for state in states}})


def _changed(base: Base, plan: Plan) -> set[str]:
    """Names of the base's parameters that a method may change in place; names of what it adds do no harm."""
    known = shape(base, plan)
    weights = {f"{module}.weight" for module in known.modules} if plan.method in ON_THE_BASE else set()
    return weights | set(known.dense)


def _own(view: "PreTrainedModel", names: set[str]) -> None:
    """Gives a view tensors of its own; what shares one goes on to share it."""
    import torch

    mine = {id(tensor): tensor for name, tensor in view.named_parameters() if name in names}
    made = {key: torch.nn.Parameter(tensor.detach().clone(), requires_grad=False) for key, tensor in mine.items()}
    for module in view.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            if id(tensor) in made:
                setattr(module, name, made[id(tensor)])
