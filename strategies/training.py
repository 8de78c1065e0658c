"""Fine-tunes on one machine as a plan says: seed, load, attach, start from an adapter, train, take out what was trained."""

import hashlib
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from protocol.adapter import Adapter
from protocol.errors import ConfigurationError, DivergenceError, HardwareError
from protocol.files import whole_folder
from protocol.plan import QUANTISED, Plan
from protocol.training_settings import PAGED
from strategies import processes
from strategies.adapted import with_adapter
from strategies.base_model import Base, load, load_tokenizer
from strategies.checkpoints import Checkpoints, Sealed
from strategies.data.encode import Encoded, encode
from strategies.data.formats import Row
from strategies.divergence import Diverged, Watch
from strategies.forgetting import guards
from strategies.methods.method import NOTHING, Begun
from strategies.methods.registry import method_of, shape
from strategies.objectives import classification, distillation, dpo, kto, regression, reward, rl, sft
from strategies.objectives.penalty import penalised
from strategies.objectives.proximal import proximal
from strategies.objectives.reference import OVER_GIVEN_ANSWERS, switchable, told
from strategies.objectives.work import Work
from strategies.progress import bar, teller
from strategies.resumable import Course, finite, resumable
from strategies.training_place import Safe, placed

if TYPE_CHECKING:
    from strategies.example_budget import Sampled

log = logging.getLogger(__name__)
_OBJECTIVES = {
    "sft": sft,
    "pretraining": sft,  # on other rows
    "distillation": distillation,
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
            (full, freezing: ``energy-kept``, ``weights-moved``); ``rate-halved`` where it had diverged; with a probe what
            ``strategies.forgetting.Guard`` tells. No ``train-loss`` where each row is private.
        sampled: What the cost for each row's privacy depends on; None where the plan promises none.
    """

    adapter: Adapter
    metrics: Mapping[str, float]
    sampled: "Sampled | None" = None


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
    probe: Sequence[Row] = (),
    folder: Path | None = None,
    whole: Path | None = None,
    safe: Safe | None = None,
    progress: bool = False,
) -> Trained:
    """Trains once; asked the same again with the same folder, it goes on from the newest checkpoint there.

    On a CPU what comes out is to the bit what an uninterrupted training makes. A loss that becomes NaN or explodes leads back
    to the last good checkpoint, or the start, with half the learning rate, once.

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
        probe: General rows; ``plan.forgetting`` says how much the model may lose there (``strategies.forgetting``).
        folder: Keeps checkpoints, TensorBoard logs and the curve (``strategies.progress``); without it nothing is kept.
        whole: A method that trains weights of the base saves the model that it made there, as transformers do.
        safe: Seals both (``strategies.training_place``).
        progress: Say how far it is on standard error, every ``logging_steps``; with a bar where that is a terminal.

    Raises:
        UserError: The plan, the rows, the base and the machine do not fit together, or training diverged twice.
        AdapterError: ``start`` is of another base.
    """
    can_train(plan)
    asked = plan, base, rows, held_out, start, reference, fresh, trains, own_labels, stretch or Stretch(), probe
    with placed(folder, whole, safe) as place:
        task = _Task(*asked, place.whole, progress)
        processes.hand_out((task, place.folder))
        return _fit(task, place.folder, place.keep)


def follow() -> None:
    """Takes part, as one process of several, in everything that the first one fits; returns when that has ended."""
    processes.follow(lambda handed: _fit(*handed))


def can_train(plan: Plan) -> None:
    """Holds a plan against the machine and the processes here.

    Raises:
        HardwareError: It needs a GPU, and there is none.
        ConfigurationError: It does not go with the number of processes, or needs a library that is not installed.
    """
    import importlib.util

    import torch

    t, problems = plan.training, []
    if not torch.cuda.is_available():
        if t.optim in PAGED:
            raise HardwareError(
                f"training.optim {t.optim} moves Adam's moments between a GPU and the host, and there is no GPU here; take "
                "adamw_8bit, or adamw_torch"
            )
        if t.mixed_precision == "fp16":
            raise HardwareError("training.mixed_precision fp16 needs a GPU, and there is none here; take bf16, or fp32")
    if t.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        problems.append("training.deepspeed: the package deepspeed is not installed; install it, or take training.fsdp")
    divided = "deepspeed" if t.deepspeed is not None else "fsdp" if t.fsdp else ""
    if divided and processes.count() == 1:
        problems.append(
            f"training.{divided} divides the weights over several processes, and this is one; start it with accelerate launch, "
            "or leave it out"
        )
    if processes.count() > 1:
        if t.example_privacy:
            problems.append("training.example_privacy draws the rows of a step in one process; start one process")
        if method_of(plan).penalty(plan):
            problems.append(f"method {plan.method} adds to the loss what several processes would each add; start one process")
        if t.proximal_mu:
            problems.append("training.proximal_mu is for federations, whose nodes are one process each; leave it out")
    if problems:
        raise ConfigurationError("plan", problems)
    if divided and not torch.cuda.is_available():
        raise HardwareError(f"training.{divided} divides weights over GPUs, and there is none here; leave it out")


@dataclass(frozen=True)
class _Task:
    """What ``fit`` was asked; the fields are its arguments."""

    plan: Plan
    base: Base
    rows: Sequence[Row]
    held_out: Sequence[Row]
    start: Adapter
    reference: Adapter | None
    fresh: bool
    trains: Literal["both", "A", "B"]
    own_labels: frozenset[int] | None
    stretch: Stretch
    probe: Sequence[Row]
    whole: Path | None
    progress: bool

    @property
    def near(self) -> Adapter:
        """What the objective stays near."""
        return self.start if self.reference is None else self.reference

    @property
    def watched(self) -> bool:
        """Whether it is evaluated while it trains."""
        return bool(self.plan.training.eval_steps and self.held_out)

    def identity(self) -> str:
        """SHA-256 over all that decides what is computed."""
        told = [
            self.plan.model_dump_json(),
            self.base.digest,
            self.start.digest(),
            self.near.digest(),
            str(self.fresh),
            self.trains,
            str(None if self.own_labels is None else sorted(self.own_labels)),
            repr(self.stretch),
            str(processes.count()),
            f"{len(self.rows)} {len(self.held_out)} {len(self.probe)}",
        ]
        digest = hashlib.sha256("\0".join(told).encode())
        for row in chain(self.rows, self.held_out, self.probe):
            digest.update(repr(row).encode(errors="surrogatepass"))
        return digest.hexdigest()


def _fit(task: _Task, place: Path, keep: Callable[[], None] = lambda: None) -> Trained:
    """Trains on from the newest checkpoint; where it diverges, once more from a good one with half the rate."""
    kept = Checkpoints(place, task.identity(), task.plan.training.save_total_limit, keep)
    if processes.is_first():
        kept.begin()
    while True:
        processes.wait()
        found = kept.newest()
        if found:
            log.warning("going on from %s, after step %d", found.path, found.step)
        try:
            return _train(task, place, kept, found)
        except Diverged as error:
            step, good, what = error.step, error.good, error.what
            if task.plan.training.example_privacy:  # to train again would tell of every row again
                raise DivergenceError(
                    f"training diverged at step {step}: {what}; take a lower training.learning_rate"
                ) from None
            if kept.halved:
                raise DivergenceError(
                    f"training diverged at step {step} with half the rate too: {what}; take a lower training.learning_rate, or "
                    "look at the rows"
                ) from None
        if processes.is_first():
            kept.go_back(good)
        back = kept.newest()
        log.warning(
            "training diverged at step %d: %s; back to %s, with half the learning rate",
            step,
            what,
            back.path if back else "the start",
        )


def _train(task: _Task, place: Path, kept: Checkpoints, found: Sealed | None) -> Trained:
    from transformers import PrinterCallback, ProgressCallback, set_seed

    base, near, start = task.base, task.near, task.start
    reads = load_tokenizer(base)
    train, held = _encoded(task.rows, reads, task.plan), _encoded(task.held_out, reads, task.plan) if task.watched else None
    plan = _settled(task.plan, len(train.rows))
    if processes.is_first():
        _warn_of_long_rows(train, len(task.rows), plan)
    given, moved = plan.objective in OVER_GIVEN_ANSWERS, bool(near.factors or near.dense)
    if given and moved:  # first of all, so that there is never more than one model in memory
        train, held = _told(train, held, *with_adapter(plan, base, near), plan)
    set_seed(plan.training.seed)
    model, tokenizer = load(base, plan)
    method = method_of(plan)
    model = method.attach(model, plan)
    if given and not moved and not switchable(model):
        train, held = _told(train, held, model.eval(), tokenizer, plan)
    second = plan.objective == "rl" and plan.rl.beta and (moved or not switchable(model))
    course = Course(kept, found, Watch(plan.training.divergence_factor, _floor(plan, train)), method)
    work = Work(
        model,
        tokenizer,
        plan,
        train,
        held,
        dense=method.dense(model),
        head=shape(base, plan).head,
        own_labels=task.own_labels,
        reference=with_adapter(plan, base, near)[0] if second else None,
        trainer_class=lambda parent: resumable(_trainer(parent, plan, task.stretch), course),
    )
    arguments = _arguments(plan, place, task.watched)
    watching = guards(plan, task.probe, reads)
    arguments["callbacks"] += [*method.callbacks(model, plan, task.stretch.done), *(guard.callback() for guard in watching)]
    arguments["callbacks"].append(teller(place, aloud=task.progress))
    trainer = _OBJECTIVES[plan.objective].trainer(work, **arguments)
    trainer.args._n_gpu = 1  # noqa: SLF001 - one process, one device; several GPUs go through accelerate's launcher
    _full_precision(model, plan)
    method.load(model, start, fresh=task.fresh)
    taken = NOTHING if start.factors else method.begin(model, plan, base)
    method.train_only(model, task.trains)
    begun = time.perf_counter()
    for raw in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(raw)
    if task.progress and sys.stderr.isatty():
        trainer.add_callback(bar())
    result = trainer.train(resume_from_checkpoint=str(found.path) if found else None)
    if not finite(trainer.optimizer):
        raise Diverged(result.global_step, result.global_step - 1, "its weights are not finite")
    history = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    metrics = {
        **({} if plan.training.example_privacy else {"train-loss": course.watch.mean}),
        "train-seconds": time.perf_counter() - begun,
        "train-steps": float(result.global_step),
        "trainable-parameters": float(sum(p.numel() for p in model.parameters() if p.requires_grad)),
        "cut-rows": float(train.cut),
        "dropped-rows": float(train.dropped),
        **({"rate-halved": 1.0} if kept.halved else {}),
        **{name: value for guard in watching for name, value in guard.figures.items()},
    }
    model, taken = _in_one_piece(trainer, task, model, taken)
    if not processes.is_first():
        return Trained(_NOTHING, metrics)
    if task.whole and method.trains_base:
        with whole_folder(task.whole) as draft:
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
    adapter = method.extract(model, taken)
    told = {"eval-loss": history[-1]} if history else {}
    return Trained(adapter, {**metrics, **told, **method.metrics(model)}, _sampled(plan, len(train.rows), result.global_step))


def _settled(plan: Plan, rows: int) -> Plan:
    """The plan with the noise that its promise to each row takes, where it makes one and nobody has settled it yet."""
    promised = plan.training.example_privacy
    if promised is None or promised.noise_multiplier is not None:
        return plan
    from strategies.example_budget import with_noise

    return with_noise(plan, rows)


def _sampled(plan: Plan, rows: int, steps: int) -> "Sampled | None":
    promised = plan.training.example_privacy
    if promised is None or promised.noise_multiplier is None:
        return None
    from strategies.example_budget import Sampled, batch_of

    return Sampled(rows, batch_of(plan.training), promised.noise_multiplier, steps)


def _in_one_piece(trainer: Any, task: _Task, model: Any, taken: Begun) -> tuple[Any, Begun]:
    """The trained model, with the weights that were divided over processes together again in the first one."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return model, taken
    held = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not processes.is_first():
        return model, taken
    method, plan = method_of(task.plan), task.plan
    whole = method.attach(load(task.base, plan)[0], plan)
    method.load(whole, task.start, fresh=task.fresh)
    taken = NOTHING if task.start.factors else method.begin(whole, plan, task.base)
    whole.load_state_dict(held, strict=False)
    return whole, taken


def _floor(plan: Plan, train: Encoded) -> float:
    """The loss below which a beginning counts as this: a nat, or the square of the numbers that are to be told."""
    if plan.objective == "rl":
        return math.inf  # it is no measure of anything: it begins at zero and may well grow
    if plan.objective == "regression":
        labels = [float(row["labels"]) for row in train.rows]
        return max(1.0, math.fsum(label**2 for label in labels) / max(1, len(labels)))
    return 1.0


def _encoded(rows: Sequence[Row], tokenizer: Any, plan: Plan) -> Encoded:
    encoded = encode(rows, tokenizer, plan.data.max_length, plan.objective)
    if plan.objective == "kto":
        settings = plan.training
        paired = kto.mismatched(encoded.rows, settings.batch_size, plan.data.max_length, settings.seed)
        return replace(encoded, rows=paired)
    return encoded


def _warn_of_long_rows(train: Encoded, given: int, plan: Plan) -> None:
    if plan.objective == "pretraining" or not (train.cut or train.dropped):
        return  # of blocks none is too long
    cut = train.cut - train.dropped
    parts = [f"{cut} cut at their end"] if cut > 0 else []
    parts += [f"{train.dropped} left out, for nothing is left to learn"] if train.dropped else []
    log.warning(
        "of %d rows %s: data.max_length is %d tokens, and the longest row has %d",
        given,
        ", ".join(parts),
        plan.data.max_length,
        train.longest,
    )


def _told(train: Encoded, kept: Encoded | None, model: Any, tokenizer: Any, plan: Plan) -> tuple[Encoded, Encoded | None]:
    """The rows with what the reference, this model, says of them."""
    import torch

    if torch.cuda.is_available() and plan.precision not in QUANTISED:
        model.to("cuda")
    pad = int(tokenizer.pad_token_id or 0)
    kept = replace(kept, rows=told(kept.rows, model, plan, pad)) if kept else None
    return replace(train, rows=told(train.rows, model, plan, pad)), kept


def _arguments(plan: Plan, folder: Path, watch: bool) -> dict[str, Any]:
    import torch
    from transformers import EarlyStoppingCallback

    t = plan.training
    gpu = torch.cuda.is_available()
    callbacks: list[Any] = []
    if t.early_stopping_patience and watch:
        callbacks.append(EarlyStoppingCallback(t.early_stopping_patience))
    best = t.keeps_best and watch
    evaluate, save = t.eval_steps if watch else None, t.eval_steps if best else t.save_steps
    return {
        "output_dir": str(folder),
        "callbacks": callbacks,
        "learning_rate": t.learning_rate,
        "per_device_train_batch_size": t.batch_size,
        "per_device_eval_batch_size": t.eval_batch_size or t.batch_size,
        "gradient_accumulation_steps": 1 if t.example_privacy else t.gradient_accumulation_steps,
        "num_train_epochs": t.num_train_epochs,
        "max_steps": t.max_steps or -1,
        "lr_scheduler_type": t.lr_scheduler_type,
        # transformers 5: below 1 it is a share of all steps
        "warmup_steps": t.warmup_ratio if t.warmup_steps is None else t.warmup_steps,
        # Some objectives have an order of their own, which TRL's arguments name.
        **({} if t.train_sampling_strategy == "random" else {"train_sampling_strategy": t.train_sampling_strategy}),
        "optim": t.optim,
        "adam_beta1": t.adam_beta1,
        "adam_beta2": t.adam_beta2,
        "adam_epsilon": t.adam_epsilon,
        "weight_decay": t.weight_decay,
        "max_grad_norm": 0.0 if t.example_privacy else t.max_grad_norm,
        "neftune_noise_alpha": t.neftune_noise_alpha,
        "activation_checkpointing": t.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if t.gradient_checkpointing else None,
        "bf16": t.mixed_precision == "bf16",
        "fp16": t.mixed_precision == "fp16",
        "seed": t.seed,
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "eval_strategy": _every(evaluate),
        "eval_steps": evaluate if isinstance(evaluate, int) else None,
        "save_strategy": _every(save),
        "save_steps": save if isinstance(save, int) else 500,
        "restore_callback_states_from_checkpoint": True,
        "load_best_model_at_end": best,
        "logging_steps": t.logging_steps,
        "report_to": ["tensorboard"] if t.tensorboard else [],
        "disable_tqdm": True,
        **_divided(plan),
    }


def _every(steps: int | str | None) -> str:
    return "no" if steps is None else "steps" if isinstance(steps, int) else "epoch"


def _divided(plan: Plan) -> dict[str, Any]:
    t = plan.training
    if t.fsdp:
        return {"fsdp": True, "fsdp_config": dict(t.fsdp_config)}
    if t.deepspeed is not None:
        return {"deepspeed": str(t.deepspeed) if isinstance(t.deepspeed, Path) else dict(t.deepspeed)}
    return {}


def _trainer(parent: Any, plan: Plan, stretch: Stretch) -> Any:
    made = _on_a_stretch(parent, stretch)
    if penalty := method_of(plan).penalty(plan):
        made = penalised(made, penalty)
    if plan.training.example_privacy:
        from strategies.example_privacy import private

        return private(made, plan)
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
