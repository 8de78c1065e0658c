"""A check for forgetting: a general probe's loss while a model trains, and the way back to the last state within the bound.

Fine-tuning on one kind of text raises the loss on others. The probe's loss when training begins is what later looks are held
against. Where one finds it more than ``max_rise`` above that, what trains is put back to where the last look within the bound
found it, and training ends. That state lies on disk beside the checkpoints, so that a run which is taken up again goes on with
it, and memory holds nothing twice.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol.mixture_settings import ForgettingSettings
from protocol.plan import Plan
from strategies.data.encode import IGNORED, encode
from strategies.data.formats import Row
from strategies.log_probs import Pair, token_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
# What a guard tells: nats per token, an optimizer step, 0 or 1.
FIGURES = ("forgetting-before", "forgetting-after", "forgetting-step", "forgetting-stopped")


class Guard:
    """Watches one training.

    Attributes:
        figures: ``forgetting-before`` and ``forgetting-after``, the probe's loss in nats per token when training began and of
            the state that is left; ``forgetting-step``, after which optimizer step that was; ``forgetting-stopped``, 1 if the
            bound ended the training, else 0.
    """

    def __init__(self, settings: ForgettingSettings, probe: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", plan: Plan):
        """Prepares the probe.

        Args:
            settings: The bound.
            probe: Texts or conversations.
            tokenizer: The base's.
            plan: Lengths and batches are as in training.

        Raises:
            DataError: The probe holds nothing to read within ``data.max_length``.
        """
        self.figures: dict[str, float] = {}
        self._settings = settings
        self._rows = [_pair(row) for row in encode(probe, tokenizer, plan.data.max_length, "sft").rows]
        self._pad, self._batch = int(tokenizer.pad_token_id or 0), plan.training.batch_size
        # What begins to train later must be put back too.
        self._everything = plan.freezing.thaw_every is not None
        self._file = Path()

    def callback(self) -> Any:
        """What tells the Hugging Face trainer to look, and to stop."""
        from transformers import TrainerCallback

        guard = self

        class Looks(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:  # noqa: ARG002
                guard.begin(model, Path(args.output_dir) / f"within-bound-{args.process_index}.safetensors", state.global_step)

            def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:  # noqa: ARG002
                guard.figures["forgetting-stopped"] = 0.0  # whatever had ended it, it goes on
                if state.global_step % guard._settings.every == 0 and not guard.look(model, state.global_step):
                    control.should_training_stop = True

            def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:  # noqa: ARG002
                guard.look(model, state.global_step)

        return Looks()

    def begin(self, model: Any, file: Path, step: int) -> None:
        """Looks once at what is there.

        Args:
            model: About to train.
            file: Keeps the last state within the bound.
            step: Optimizer steps that a run which is taken up again has behind it: then ``file`` says where it began.
        """
        self._file = file
        if step and file.is_file():
            self.figures = self._kept()
            return
        loss = self.loss(model)
        self.figures = dict(zip(FIGURES, (loss, loss, 0.0, 0.0), strict=True))
        self._keep(model)

    def look(self, model: Any, step: int) -> bool:
        """Whether the model is within the bound; if it is not, it goes back to where it last was."""
        before, loss = self.figures["forgetting-before"], self.loss(model)
        if loss - before <= self._settings.max_rise:  # False for NaN
            if not self.figures["forgetting-stopped"]:
                self.figures |= {"forgetting-after": loss, "forgetting-step": float(step)}
                self._keep(model)
            return True
        self._restore(model)
        self.figures = self._kept() | {"forgetting-stopped": 1.0}
        self._keep(model)  # a run that dies now and is taken up again knows why it had ended
        log.warning(
            "the general probe's loss rose from %.4g to %.4g nats per token by step %d, more than forgetting.max_rise, %g: "
            "training ends with the state after step %d, whose loss is %.4g",
            before,
            loss,
            step,
            self._settings.max_rise,
            self.figures["forgetting-step"],
            self.figures["forgetting-after"],
        )
        return False

    def loss(self, model: Any) -> float:
        """The probe's mean loss in nats per token, without dropout; the model goes on in the mode that it was in."""
        was = model.training
        model.eval()
        told = token_log_probs(model, self._rows, self._pad, self._batch)
        model.train(was)
        return -float(sum(each.sum() for each in told)) / sum(len(each) for each in told)

    def _trained(self, model: Any) -> dict[str, Any]:
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad or self._everything}

    def _keep(self, model: Any) -> None:
        from safetensors.torch import save_file

        part = self._file.with_suffix(".part")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self._trained(model).items()}
        save_file(tensors, part, {name: repr(value) for name, value in self.figures.items()})
        part.replace(self._file)

    def _kept(self) -> dict[str, float]:
        from safetensors import safe_open

        with safe_open(self._file, framework="pt") as opened:
            return {name: float(value) for name, value in opened.metadata().items()}

    def _restore(self, model: Any) -> None:
        import torch
        from safetensors import safe_open

        with torch.no_grad(), safe_open(self._file, framework="pt") as opened:
            for name, tensor in self._trained(model).items():
                tensor.copy_(opened.get_tensor(name))


def guards(plan: Plan, probe: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> list[Guard]:
    """The guard of a plan that wants one and has a probe; none otherwise."""
    if plan.forgetting is None or not probe:
        return []
    return [Guard(plan.forgetting, probe, tokenizer, plan)]


def _pair(row: dict[str, Any]) -> Pair:
    """What is read, and what of it counts: encoded rows have no loss up to where the answer begins."""
    ids, labels = row["input_ids"], row["labels"]
    begin = next(at for at, label in enumerate(labels) if label != IGNORED)
    return ids[:begin], ids[begin:]
