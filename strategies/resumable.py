"""A trainer class that goes on from its checkpoints to the bit, and stops where its loss diverges.

Hugging Face's trainers restore optimizer, schedule and random numbers, but the weights as ``save_pretrained`` wrote them: a
prefix without the network that it is trained through, AdaLoRA without its scores. Here a checkpoint holds the very tensors
that the optimizer moves, what the method keeps beside them, and TRL's answers that wait for another step.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from protocol.errors import DataError
from strategies.checkpoints import Checkpoints, Sealed
from strategies.divergence import Watch
from strategies.methods.method import Method

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # the real one stands behind it among the bases

_FILE = "trained.pt"


@dataclass(frozen=True)
class Course:
    """What a training keeps of itself.

    Attributes:
        kept: Its checkpoints; ``kept.halved`` halves the rate.
        found: The one that ``train(resume_from_checkpoint=…)`` is given.
        watch: Is told the loss of every step; what it raises ends the training.
        method: Says what it keeps beside parameters.
    """

    kept: Checkpoints
    found: Sealed | None
    watch: Watch
    method: Method


def resumable(parent: Any, course: Course) -> Any:
    """``parent``, ``transformers.Trainer`` or a subclass, with checkpoints that are exact and sealed."""
    return type("Resumable", (_Resumable, parent), {"course": course})


def finite(optimizer: Any) -> bool:
    """Whether every number that an optimizer moves is finite."""
    import torch

    return all(bool(torch.isfinite(p).all()) for group in optimizer.param_groups for p in group["params"])


class _Resumable(Trainer):  # type: ignore[misc]
    course: Course

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._losses: list[Any] = []
        self.add_callback(_steps(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        except UnpicklingError:  # torch.load(weights_only=True), everywhere: what is no tensor is not made
            path = self.course.found.path if self.course.found else self.args.output_dir
            raise DataError(
                f"{path}: a file of it holds no tensors; it is no checkpoint of this training, so delete it"
            ) from None

    @property
    def _own(self) -> bool:
        """Weights that are divided over processes are kept by who divided them."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    # The loss of each step ----------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss.detach())
        return loss

    def note_step(self, step: int) -> None:
        """An optimizer step is done."""
        import torch

        loss = torch.stack(self._losses).sum().double()
        self._losses.clear()
        if self.args.world_size > 1:  # every process must come to the same end
            loss = self.accelerator.reduce(loss.float(), "mean")
        self.course.watch.note(float(loss), step)

    # Keeping ------------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        path = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(path, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save and finite(self.optimizer):
            self.course.kept.seal(
                path,
                {
                    "halved": self.course.kept.halved,
                    "over": self.control.should_training_stop,
                    "epoch": self.state.epoch,
                    "score": self._score(),
                    "losses": self.course.watch.state(),
                },
            )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: TRL's would call the base nameless and praise an example of its own."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        import torch
        from peft import PeftModel

        if not self._own:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        held = {
            "parameters": {name: p.detach() for name, p in _moved(self.model, self.optimizer).items()},
            "method": dict(self.course.method.state(self.model)),
            "micro_steps": getattr(self, "_step", None),
            "answers": getattr(self, "_buffered_inputs", None),
        }
        torch.save(held, folder / _FILE)
        if isinstance(self.model, PeftModel):  # so that others can use it too
            super()._save(output_dir, state_dict)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's form of a model card, with nothing filled in

    def _score(self) -> float | None:
        """How good the evaluation at this step was; more is better."""
        name = f"eval_{(self.args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        at = [entry[name] for entry in self.state.log_history if name in entry and entry["step"] == self.state.global_step]
        if not at or not math.isfinite(at[-1]):
            return None
        return float(at[-1] if self.args.greater_is_better else -at[-1])

    # Going on -----------------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.course.found:
            self.course.watch.restore(self.course.found.facts["losses"])
        if not self._own:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        held = self._put_back(Path(resume_from_checkpoint))
        self.course.method.restore(self.model, held["method"])
        if held["micro_steps"] is not None:
            self._step, self._buffered_inputs = held["micro_steps"], held["answers"]

    def _load_best_model(self) -> None:
        if self._own:
            self._put_back(Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _put_back(self, path: Path) -> Any:
        import torch

        held = torch.load(path / _FILE, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, tensor in held["parameters"].items():
                self.model.get_parameter(name).copy_(tensor)
        return held

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """A sampler that draws one order after the other from a generator: those of epochs that are over go by."""
        import torch
        from transformers.trainer_pt_utils import LengthGroupedSampler

        sampler = super()._get_train_sampler(*args, **kwargs)
        by_length = isinstance(sampler, LengthGroupedSampler)
        if by_length:  # or it would draw from what a checkpoint puts back in the middle of an epoch
            sampler.generator = torch.Generator().manual_seed(self.args.seed)
        for _ in range(int(round(self.course.found.facts["epoch"], 6)) if self.course.found else 0):
            if by_length:
                list(sampler)
            elif hasattr(sampler, "mini_repeat_count"):  # TRL's, for answers
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    def _run_epoch(self, *, epoch: int, train_dataloader: Any, **kwargs: Any) -> None:
        found = self.course.found
        if self.state.global_step >= self.state.max_steps or (found and found.facts["over"]):
            self.control.should_training_stop = True  # it had ended, and died before what it made was taken out
            return
        inner = getattr(train_dataloader, "batch_sampler", None)
        while inner is not None:  # of several processes the trainer reaches the outermost alone
            if hasattr(inner, "set_epoch"):
                inner.set_epoch(epoch)
            inner = getattr(inner, "batch_sampler", None) or getattr(inner, "sampler", None)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)


def _steps(trainer: _Resumable) -> Any:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            course = trainer.course
            if course.kept.halved and not (course.found and course.found.facts["halved"]):
                _halve(kwargs["optimizer"], kwargs["lr_scheduler"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            trainer.note_step(state.global_step)

    return Steps()


def _moved(model: Any, optimizer: Any) -> dict[str, Any]:
    """The parameters that an optimizer moves, by their name in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}


def _halve(optimizer: Any, schedule: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
        group["initial_lr"] *= 0.5
    schedule.base_lrs = [rate * 0.5 for rate in schedule.base_lrs]
    schedule._last_lr = [rate * 0.5 for rate in schedule.get_last_lr()]  # noqa: SLF001 - what the log says of the next step
