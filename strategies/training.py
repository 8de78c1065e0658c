"""Fine-tunes on one machine as a plan says: seed, load, attach, start from an adapter, train, take out what was trained."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from protocol.adapter import Adapter
from protocol.files import whole_folder
from protocol.plan import QUANTISED, Plan
from strategies.adapted import with_adapter
from strategies.base_model import Base, load, load_tokenizer
from strategies.data.encode import Encoded, encode
from strategies.data.formats import Row
from strategies.methods.method import NOTHING
from strategies.methods.registry import method_of, shape
from strategies.objectives import classification, dpo, kto, regression, reward, rl, sft
from strategies.objectives.penalty import penalised
from strategies.objectives.proximal import proximal
from strategies.objectives.reference import OVER_GIVEN_ANSWERS, switchable, told
from strategies.objectives.work import Work

_OBJECTIVES = {
    "sft": sft,
    "pretraining": sft,  # on other rows
    "classification": classification,
    "regression": regression,
    "dpo": dpo,
    "kto": kto,
    "reward": reward,
    "rl": rl,
}
_NOTHING = Adapter()


@dataclass(frozen=True)
class Stretch:
    """Which part of a longer schedule a training is: a federation warms up once and decays over all of its rounds.

    Every stretch begins with an optimizer that knows nothing: Adam's first steps have full length whatever the gradient's
    noise. So within each stretch the rate climbs to the schedule's over the first steps. (On GSM8K with one node, 40 rounds of
    10 steps: perplexity 13.7 without, 11.6 and 11.2 climbing over half and all of a round, 11.4 with the optimizer's
    state kept, 11.5 in one piece; benchmarks/LOG.md.)

    Attributes:
        done: Optimizer steps that earlier rounds took.
        total: Optimizer steps of all rounds; None when this training is the whole.
        climb: Steps over which the rate climbs to the schedule's.
    """

    done: int = 0
    total: int | None = None
    climb: int = 0


@dataclass(frozen=True)
class Trained:
    """What a training made.

    Attributes:
        adapter: Absolute tensors, float32.
        metrics: ``train-loss``, ``train-seconds``, ``train-steps``, ``trainable-parameters``, ``cut-rows``,
            ``dropped-rows``, with held-out rows ``eval-loss`` of the last evaluation, and what the method has to say
            (full, freezing: ``energy-kept``, ``weights-moved``).
    """

    adapter: Adapter
    metrics: Mapping[str, float]


def fit(
    plan: Plan,
    base: Base,
    rows: Sequence[Row],
    held_out: Sequence[Row] = (),
    *,
    start: Adapter = _NOTHING,
    reference: Adapter | None = None,
    fresh: bool = False,
    trains: Literal["both", "A", "B"] = "both",
    own_labels: frozenset[int] | None = None,
    stretch: Stretch | None = None,
    folder: Path | None = None,
    whole: Path | None = None,
    progress: bool = False,
) -> Trained:
    """Trains once.

    Args:
        plan: What to do; its data paths are not looked at.
        base: The frozen base.
        rows: Training rows.
        held_out: Rows for evaluation while training (``plan.training.eval_steps``).
        start: Adapter to start from; directions beyond the plan's rank are frozen in place. Without factors in it, they begin
            as the plan says (``lora.init_lora_weights``).
        reference: What dpo, kto and rl stay near, the adapter that the model had before the objective began
            (``strategies.objectives.reference``). Without it, ``start``.
        fresh: All directions of ``start`` are frozen in place, and new factors train beside them (FLoRA).
        trains: Which factor trains (FFA-LoRA, RoLoRA).
        own_labels: Classification: the only rows of the head that train; None for all.
        stretch: Where on a longer learning-rate schedule this is.
        folder: Keeps checkpoints and TensorBoard logs; without it nothing is kept.
        whole: A method that trains weights of the base saves the model that it made there, as transformers do.
        progress: Show progress bars.

    Raises:
        UserError: The plan, the rows and the base do not fit together.
        AdapterError: ``start`` is of another base.
    """
    from transformers import PrinterCallback, set_seed

    watch = plan.training.eval_steps and held_out
    reads = load_tokenizer(base)
    train, kept = _encoded(rows, reads, plan), _encoded(held_out, reads, plan) if watch else None
    near = start if reference is None else reference
    given, moved = plan.objective in OVER_GIVEN_ANSWERS, bool(near.factors or near.dense)
    if given and moved:  # first of all, so that there is never more than one model in memory
        train, kept = _told(train, kept, *with_adapter(plan, base, near), plan)
    set_seed(plan.training.seed)
    model, tokenizer = load(base, plan)
    method = method_of(plan)
    model = method.attach(model, plan)
    if given and not moved and not switchable(model):
        train, kept = _told(train, kept, model.eval(), tokenizer, plan)
    second = plan.objective == "rl" and plan.rl.beta and (moved or not switchable(model))
    with tempfile.TemporaryDirectory(prefix="fedge-") as scratch:
        work = Work(
            model,
            tokenizer,
            plan,
            train,
            kept,
            dense=method.dense(model),
            head=shape(base, plan).head,
            own_labels=own_labels,
            reference=with_adapter(plan, base, near)[0] if second else None,
            trainer_class=lambda parent: _trainer(parent, plan, stretch or Stretch()),
        )
        arguments = _arguments(plan, folder or Path(scratch), bool(watch), progress)
        arguments["callbacks"] += method.callbacks(model, plan, (stretch or Stretch()).done)
        trainer = _OBJECTIVES[plan.objective].trainer(work, **arguments)
        trainer.args._n_gpu = 1  # noqa: SLF001 - one process, one device; several GPUs go through accelerate's launcher
        _full_precision(model, plan)
        method.load(model, start, fresh=fresh)
        taken = NOTHING if start.factors else method.begin(model, plan, base)
        method.train_only(model, trains)
        begun = time.perf_counter()
        trainer.remove_callback(PrinterCallback)
        result = trainer.train()
    history = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    metrics = {
        "train-loss": float(result.training_loss),
        "train-seconds": time.perf_counter() - begun,
        "train-steps": float(result.global_step),
        "trainable-parameters": float(sum(p.numel() for p in model.parameters() if p.requires_grad)),
        "cut-rows": float(train.cut),
        "dropped-rows": float(train.dropped),
    }
    if whole and method.trains_base:
        with whole_folder(whole) as draft:
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
    adapter = method.extract(model, taken)
    told = {"eval-loss": history[-1]} if history else {}
    return Trained(adapter, {**metrics, **told, **method.metrics(model)})


def _encoded(rows: Sequence[Row], tokenizer: Any, plan: Plan) -> Encoded:
    encoded = encode(rows, tokenizer, plan.data.max_length, plan.objective)
    if plan.objective == "kto":
        settings = plan.training
        paired = kto.mismatched(encoded.rows, settings.batch_size, plan.data.max_length, settings.seed)
        return replace(encoded, rows=paired)
    return encoded


def _told(train: Encoded, kept: Encoded | None, model: Any, tokenizer: Any, plan: Plan) -> tuple[Encoded, Encoded | None]:
    """The rows with what the reference, this model, says of them."""
    import torch

    if torch.cuda.is_available() and plan.precision not in QUANTISED:
        model.to("cuda")
    pad = int(tokenizer.pad_token_id or 0)
    kept = replace(kept, rows=told(kept.rows, model, plan, pad)) if kept else None
    return replace(train, rows=told(train.rows, model, plan, pad)), kept


def _arguments(plan: Plan, folder: Path, watch: bool, progress: bool) -> dict[str, Any]:
    import torch
    from transformers import EarlyStoppingCallback

    t = plan.training
    gpu = torch.cuda.is_available()
    callbacks: list[Any] = []
    if t.early_stopping_patience and watch:
        callbacks.append(EarlyStoppingCallback(t.early_stopping_patience))
    save_steps = t.eval_steps if t.early_stopping_patience and watch else t.save_steps
    return {
        "output_dir": str(folder),
        "callbacks": callbacks,
        "learning_rate": t.learning_rate,
        "per_device_train_batch_size": t.batch_size,
        "per_device_eval_batch_size": t.batch_size,
        "gradient_accumulation_steps": t.gradient_accumulation_steps,
        "num_train_epochs": t.num_train_epochs,
        "max_steps": t.max_steps or -1,
        "lr_scheduler_type": t.lr_scheduler_type,
        "warmup_steps": t.warmup_ratio,  # transformers 5: below 1 it is a share of all steps
        "optim": t.optim,
        "weight_decay": t.weight_decay,
        "max_grad_norm": t.max_grad_norm,
        "activation_checkpointing": t.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if t.gradient_checkpointing else None,
        "bf16": t.mixed_precision == "bf16",
        "fp16": t.mixed_precision == "fp16",
        "seed": t.seed,
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "eval_strategy": "steps" if watch else "no",
        "eval_steps": t.eval_steps,
        "save_strategy": "steps" if save_steps else "no",
        "save_steps": save_steps or 500,
        "save_total_limit": t.save_total_limit,
        "load_best_model_at_end": bool(t.early_stopping_patience and watch),
        "logging_steps": t.logging_steps,
        "report_to": ["tensorboard"] if t.tensorboard else [],
        "disable_tqdm": not progress,
    }


def _trainer(parent: Any, plan: Plan, stretch: Stretch) -> Any:
    made = _on_a_stretch(parent, stretch)
    if penalty := method_of(plan).penalty(plan):
        made = penalised(made, penalty)
    return proximal(made, plan.training.proximal_mu) if plan.training.proximal_mu else made


def _on_a_stretch(parent: Any, stretch: Stretch) -> Any:
    """The trainer class with its learning-rate schedule begun ``stretch.done`` steps ago and ``stretch.total`` long."""
    from torch.optim.lr_scheduler import LambdaLR

    class OnAStretch(parent):  # type: ignore[misc]
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            whole = super().create_scheduler(stretch.total or num_training_steps, optimizer)
            if stretch.done or stretch.climb:
                factor, climb = whole.lr_lambdas[0], max(1, stretch.climb)
                self.lr_scheduler = LambdaLR(
                    whole.optimizer, lambda step: factor(step + stretch.done) * min(1.0, (step + 1) / climb)
                )
            return self.lr_scheduler

    return OnAStretch


def _full_precision(model: Any, plan: Plan) -> None:
    """TRL rounds the factors of a quantised base to bfloat16, which loses small updates; they are few, so keep float32."""
    import torch

    if plan.precision in QUANTISED:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32)
