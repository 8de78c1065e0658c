"""Ten nodes of different ranks in one process, for benchmarks of many runs: real rules, starts and adapters over a plain loop.

A run through Flower and the Trainer pays for messages, processes and set-up, which here would cost more than the training. So
rows are tokenised once, models stay in memory, and all nodes of a round take their steps side by side in one forward pass.
What is compared is the project's own: ``server.aggregation`` merges, ``Start`` says what travels and trains,
``strategies.methods.lora`` attaches, draws and loads it. The rate falls linearly over the run and climbs within each round, in
which the optimizer is new (``strategies.training.Stretch``).
"""

import copy
import json
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer

from protocol.adapter import Adapter, Factors
from protocol.manifest import Manifest
from protocol.plan import Plan
from protocol.product_space import compress, effective_rank, inner, split
from protocol.records import Trains
from protocol.update import Update
from server.aggregation.rule import Rule, Start
from server.standing import Standing
from strategies.base_model import find, load
from strategies.data.files import read
from strategies.data.splits import window
from strategies.methods import lora
from strategies.methods.registry import shape

# [64, 32, 16, 16, 8, 8, 4, 4, 4, 4] at hidden size 64, where 32 directions are half of all.
RANKS = (32, 16, 8, 8, 4, 4, 2, 2, 2, 2)
RANK_CAP = 32
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
ALPHA = 6.0  # of rsLoRA: the change is alpha / sqrt(r) * B @ A
LONGEST = 36  # tokens; longer rows are left out
HELD_OUT = 40  # rows of each domain
IGNORED = -100


@dataclass(frozen=True)
class Row:
    """Token ids of ``utterance -> intent``, and the number of them before the answer."""

    ids: tuple[int, ...]
    prompt: int


@dataclass(frozen=True)
class Size:
    """How long a run is. A node takes ``rounds * steps * batch_size`` rows."""

    rounds: int
    steps: int
    batch_size: int

    @property
    def rows(self) -> int:
        """Rows that one node takes in all."""
        return self.rounds * self.steps * self.batch_size


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        loss: Mean over domains of the held-out loss per answer token, in nats.
        effective_rank: Of the last global adapter, mean over modules.
    """

    loss: float
    effective_rank: float


@dataclass(frozen=True)
class Job:
    """One node's training in one round: where it begins, its rows, and what draws the directions that the start leaves free."""

    start: Start
    rows: Sequence[Row]
    seed: int


@dataclass(frozen=True)
class Reply:
    """What a node sends, and what it is counted from."""

    node: int
    update: Update
    start: Adapter


# Of a node and a round, what it began from (the part that trained) and what it trained: what it sends.
Tamper = Callable[[int, int, Adapter, Adapter], Adapter]


class Cohort:
    """The nodes' rows and models.

    Args:
        data: Folder of the test data.
        size: Of every run.
    """

    def __init__(self, data: Path, size: Size) -> None:
        self.size = size
        base = find(str((data / "models" / "stories260k-hf").resolve()))
        self._digest = base.digest
        settings = {"r": RANK_CAP, "lora_alpha": ALPHA, "use_rslora": True, "target_modules": TARGETS}
        self._plan = Plan(base_model=base.name, lora=settings)
        self._untouched, self._tokenizer = load(base, self._plan)
        self._models: dict[int, Any] = {}
        self.modules = shape(base, self._plan).modules
        self._model = copy.deepcopy(self._untouched).requires_grad_(False)
        self._layers = {name: Stacked(self._model.get_submodule(name)) for name in self.modules}
        for name, layer in self._layers.items():
            self._model.set_submodule(name, layer)
        self._blank = Adapter({name: _empty(shape) for name, shape in self.modules.items()})
        train, held = (self._read(data / "classify" / f"clinc150_{part}.jsonl") for part in ("train", "valid"))
        self.domains = sorted(train)
        self.train = [train[domain] for domain in self.domains]
        self._held = [held[domain][:: max(1, len(held[domain]) // HELD_OUT)][:HELD_OUT] for domain in self.domains]

    def rows(self, seed: int, *, iid: bool = False) -> list[list[Row]]:
        """The rows of each node for a whole run. Which domain meets which rank is drawn by the seed.

        Args:
            seed: Of the run.
            iid: Deal the same rows out at random instead.
        """
        order = random.Random(f"domains/{seed}").sample(range(len(self.train)), len(self.train))
        found = [[self.train[at][i] for i in window(len(self.train[at]), 0, self.size.rows, seed)] for at in order]
        if not iid:
            return found
        mixed = [row for rows in found for row in rows]
        random.Random(f"iid/{seed}").shuffle(mixed)
        return [mixed[at :: len(found)] for at in range(len(found))]

    def federated(
        self,
        rule: Rule,
        rate: float,
        seed: int,
        *,
        rows: Sequence[Sequence[Row]] | None = None,
        absent: Sequence[int] = (),
        dropout: bool = False,
        tamper: Tamper | None = None,
        standing: Standing | None = None,
    ) -> Outcome:
        """One federation.

        Args:
            rule: Fresh, as ``registry.make`` gives it.
            rate: Highest learning rate.
            seed: Draws everything that is drawn.
            rows: Of each node; its own domain's by default.
            absent: Nodes that never take part.
            dropout: In each round a random half of the nodes reports.
            tamper: What nodes do to their updates.
            standing: Refuses outliers before they are merged, and leaves out who was refused again and again.
        """
        rows = rows or self.rows(seed)
        here = [node for node in range(len(RANKS)) if node not in absent]
        current = rule.initial(self.modules, tuple(RANKS[node] for node in here), seed)
        for number in range(1, self.size.rounds + 1):
            asked = sorted(random.Random(f"{seed}/{number}").sample(here, len(here) // 2)) if dropout else here
            asked = [node for node in asked if not (standing and standing.paused(str(node), number))]
            starts = {node: rule.start(current, RANKS[node], number) for node in asked}
            jobs = [self._job(starts[node], rows[node], number, 1000 * seed + 50 * number + node) for node in asked]
            trained = dict(zip(asked, self.trained(jobs, self._rates(number, rate)), strict=True))
            replies = []
            for node in asked:
                begun = starts[node].trained(starts[node].adapter)
                sent = tamper(node, number, begun, trained[node]) if tamper else trained[node]
                replies.append(Reply(node, self.update(sent, number), begun))
            current = _merged(rule, current, replies, standing, number)
        return self.outcome(current)

    def centralised(self, rate: float, seed: int) -> Outcome:
        """The same rows, pooled and shuffled, in one training of rank ``RANK_CAP``."""
        pooled = [row for rows in self.rows(seed) for row in rows]
        random.Random(f"pooled/{seed}").shuffle(pooled)
        steps = len(pooled) // self.size.batch_size
        climb = max(1, steps // 50)
        rates = [rate * (1 - step / steps) * min(1.0, (step + 1) / climb) for step in range(steps)]
        return self.outcome(*self.trained([Job(Start(Adapter(), RANK_CAP), pooled, seed)], rates))

    def trained(self, jobs: Sequence[Job], rates: Sequence[float]) -> list[Adapter]:
        """What each node makes of its start, one step for each rate; the nodes train the same factors."""
        pairs = [self._begun(job) for job in jobs]
        for name, layer in self._layers.items():
            layer.put([own[name] for own, _ in pairs], [rest.get(name) for _, rest in pairs], jobs[0].start.trains)
        tensors = [tensor for layer in self._layers.values() for tensor in layer.trainable]
        optimizer = torch.optim.AdamW(tensors, weight_decay=0.0, fused=True)
        size = self.size.batch_size
        for step, rate in enumerate(rates):
            optimizer.param_groups[0]["lr"] = rate
            batch = [row for job in jobs for row in job.rows[step * size : (step + 1) * size]]
            self._losses(batch, len(jobs)).sum().backward()
            _clip(tensors)
            optimizer.step()
            optimizer.zero_grad()
        return [
            Adapter({name: layer.take(at, own[name]) for name, layer in self._layers.items()})
            for at, (own, _) in enumerate(pairs)
        ]

    def outcome(self, adapter: Adapter) -> Outcome:
        """Held-out loss over all domains, and the effective rank."""
        own, rest = self._begun(Job(Start(adapter, RANK_CAP), (), 0))
        for name, layer in self._layers.items():
            layer.put([own[name]], [rest.get(name)], "both")
        with torch.no_grad():
            losses = [float(self._losses(rows, 1)) for rows in self._held]
        ranks = [effective_rank(compress([(1.0, p)], p.shape, p.r).singular_values) for p in adapter.factors.values()]
        loss = float(np.mean(losses))
        return Outcome(loss if math.isfinite(loss) else math.inf, float(np.mean(ranks)) if ranks else 0.0)

    def _job(self, start: Start, rows: Sequence[Row], number: int, seed: int) -> Job:
        taken = self.size.steps * self.size.batch_size
        return Job(start, rows[taken * (number - 1) : taken * number], seed)

    def _rates(self, number: int, rate: float) -> list[float]:
        steps = self.size.steps
        done, total = steps * (number - 1), steps * self.size.rounds
        return [rate * (1 - (done + step) / total) * (step + 1) / steps for step in range(steps)]

    def _begun(self, job: Job) -> tuple[Mapping[str, Factors], Mapping[str, Factors]]:
        """The factors that a node trains, as ``lora`` draws and loads them, and what it holds frozen beside them."""
        model = self.loaded(job)
        trains = 0 if job.start.fresh else job.start.r
        rest = {name: split(pair, trains)[1] for name, pair in job.start.adapter.factors.items()}
        return lora.extract(model).factors, {name: pair for name, pair in rest.items() if pair.r}

    def loaded(self, job: Job) -> Any:
        """A PEFT model of the start's rank with factors drawn anew, and the start in it."""
        rank, start = job.start.r, job.start
        if rank not in self._models:
            plan = self._plan.model_copy(update={"lora": self._plan.lora.with_rank(rank)})
            self._models[rank] = lora.attach(copy.deepcopy(self._untouched), plan)
        model = self._models[rank]
        torch.manual_seed(job.seed)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters("default", True)
        lora.load(model, Adapter({**self._blank.factors, **start.adapter.factors}), fresh=start.fresh)
        lora.train_only(model, start.trains)
        return model

    def _losses(self, rows: Sequence[Row], nodes: int) -> torch.Tensor:
        """Mean loss per answer token of each of ``nodes`` nodes, whose equally many rows lie one after the other."""
        ids, labels = batch(rows)
        hidden = self._model.base_model(input_ids=ids).last_hidden_state[:, :-1]
        found = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)
        logits = self._model.get_output_embeddings()(hidden[found])
        losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:][found], reduction="none")
        node = torch.div(found[0], len(rows) // nodes, rounding_mode="floor")
        return torch.zeros(nodes).index_add(0, node, losses) / torch.bincount(node, minlength=nodes)

    def update(self, adapter: Adapter, number: int) -> Update:
        """What a node sends; all have as many examples."""
        rows = self.size.steps * self.size.batch_size
        return Update(adapter, Manifest(base_digest=self._digest, kind="update", round=number, num_examples=rows))

    def _read(self, path: Path) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for _, raw in read(path):
            prompt = self._tokenizer(f"{raw['text']} ->", add_special_tokens=False)["input_ids"]
            answer = self._tokenizer(str(raw["label"]).replace("_", " "), add_special_tokens=False)["input_ids"]
            ids = (*prompt, *answer, self._tokenizer.eos_token_id)
            if len(ids) <= LONGEST:
                found.setdefault(str(raw["domain"]), []).append(Row(ids, len(prompt)))
        return found


class Stacked(torch.nn.Module):  # type: ignore[misc]
    """A linear layer with a weight and a factor pair of its own for each of K nodes, whose rows lie one after the other.

    Pairs are padded with zeros to one rank: a direction whose A and B are both zero has no gradient, so it stays zero.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self._common = linear.weight.detach().T.contiguous()
        self.trainable: list[torch.Tensor] = []

    def put(self, own: Sequence[Factors], rest: Sequence[Factors | None], trains: Trains) -> None:
        """What each node trains, and what it holds frozen."""
        rank = max(pair.r for pair in own)
        a, b = np.zeros((len(own), self._common.shape[0], rank)), np.zeros((len(own), rank, self._common.shape[1]))
        weights = []
        for at, (pair, frozen) in enumerate(zip(own, rest, strict=True)):
            a[at, :, : pair.r], b[at, : pair.r] = pair.A.T, pair.B.T
            weights.append(self._common if frozen is None else self._common + torch.tensor(frozen.product().T).float())
        self._weight = torch.stack(weights)
        self._scaling = torch.tensor([pair.scaling for pair in own])[:, None, None]
        self._a = torch.tensor(a, dtype=torch.float32, requires_grad=trains in ("both", "A"))
        self._b = torch.tensor(b, dtype=torch.float32, requires_grad=trains in ("both", "B"))
        self.trainable = [tensor for tensor in (self._a, self._b) if tensor.requires_grad]

    def take(self, node: int, own: Factors) -> Factors:
        """What a node trained, at the rank of what was put."""
        a, b = self._a.detach()[node, :, : own.r].T, self._b.detach()[node, : own.r].T
        return Factors(A=a.numpy().copy(), B=b.numpy().copy(), scaling=own.scaling)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, ``(K * rows, tokens, d_out)``."""
        rows = x.reshape(len(self._weight), -1, x.shape[-1])
        out = torch.baddbmm(torch.bmm(rows, self._weight), torch.bmm(rows, self._a) * self._scaling, self._b)
        return out.view(*x.shape[:-1], -1)


class Results:
    """Outcomes by what was run, kept in a JSONL file so that a run that was killed can go on.

    Args:
        path: Of the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Outcome] = {}
        self._read()

    def of(self, run: Mapping[str, Any], compute: Callable[[], Outcome]) -> Outcome:
        """The outcome of a run, computed unless it is known."""
        key = _key(run)
        if key not in self._known:
            self._read()  # another process may have run it
        if key not in self._known:
            self._known[key] = compute()
            if self._path:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"run": dict(run), "outcome": asdict(self._known[key])}) + "\n")
            print(f"{self._known[key].loss:8.4f}  {json.dumps(dict(run))}", file=sys.stderr, flush=True)
        return self._known[key]

    def _read(self) -> None:
        if not (self._path and self._path.is_file()):
            return
        for line in self._path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # the last line of a killed run may be half a line
                entry = json.loads(line)
                self._known[_key(entry["run"])] = Outcome(**entry["outcome"])


def _merged(rule: Rule, current: Adapter, replies: Sequence[Reply], standing: Standing | None, number: int) -> Adapter:
    refused: Mapping[int, str] = {}
    if standing:
        norms = {one.node: norm(one.start, one.update.adapter) for one in replies}
        refused = standing.outliers(norms)
        kept = [one.node for one in replies if one.node not in refused]
        standing.note(number, map(str, kept), map(str, refused))
    rule.begin(current)
    for one in replies:
        if one.node not in refused:
            rule.add(one.update, one.start, str(one.node))
    return rule.finalise()[0]


def norm(start: Adapter, trained: Adapter) -> float:
    """Frobenius norm of a node's change in product space, over all modules (as admission takes it)."""
    total = 0.0
    for module, pair in trained.factors.items():
        begun = [(-1.0, start.factors[module])] if module in start.factors else []
        total += inner([(1.0, pair), *begun], [(1.0, pair), *begun])
    return math.sqrt(max(total, 0.0))


def _clip(tensors: Sequence[torch.Tensor]) -> None:
    """Each node's gradient to the norm 1, as ``max_grad_norm`` has it; nodes are the first axis."""
    gradients = [tensor.grad.flatten(1) for tensor in tensors if tensor.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(gradient, dim=1) for gradient in gradients]).norm(dim=0)
    factor = (1.0 / (norms + 1e-6)).clamp(max=1.0)[:, None]
    torch._foreach_mul_(gradients, [factor] * len(gradients))


def batch(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, ``(rows, longest)`` each, loss on answers only. Padding is on the right, where nothing looks at it."""
    longest = max(len(row.ids) for row in rows)
    ids, labels = (torch.full((len(rows), longest), fill) for fill in (0, IGNORED))
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = torch.tensor(row.ids)
        labels[at, row.prompt : len(row.ids)] = ids[at, row.prompt : len(row.ids)]
    return ids, labels


def _empty(shape: tuple[int, int]) -> Factors:
    return Factors(A=np.zeros((0, shape[1]), np.float32), B=np.zeros((shape[0], 0), np.float32))


def _key(run: Mapping[str, Any]) -> str:
    return json.dumps(dict(run), sort_keys=True)
