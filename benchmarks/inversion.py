"""Gradient inversion: how much of a sentence an adapter update gives away, in the open, under a secure sum and with noise.

    python -m benchmarks.inversion [--data DIR] [--victims 40] [--rank 16]

The attack is that of Petrov et al. 2024 ("DAGER", arXiv:2405.15586), brought to LoRA. A gradient of A is
``s B^T sum_t g_t x_t^T``: its rows lie in the span of the layer's inputs ``x_t``. The first layer's inputs are the vocabulary's
embeddings after a norm, so every token can be held against the span of what q, k and v show together (their inputs are the
same). The layers above say which token comes next, for with a causal mask their input at a place follows from the tokens up to
it. Steps of SGD on one row leave the first layer's span as it is, however many. AdamW's have one size for every number, which
spoils the span without hiding it: there directions are weighed by how far they stand out of what spoils them.

A node with one row of CLINC150 trains stories260k (hidden size 64, vocabulary 512) from a global adapter whose B is not zero.
The attacker knows the base, the adapter that was sent, and how many tokens the row has. ``tokens``: of the row's
distinct tokens the share that is among as many candidates. ``in place``: share of the row's places with the right token.
Chance is the same attack on noise, and, for a sum, on the same sum with somebody else in the victim's place: both know how
often tokens occur. Every ± is a 95 % interval over victims. The last line is JSON.
"""

import argparse
import copy
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.cohort import Row, batch
from benchmarks.masked_sum import summed
from protocol.adapter import Adapter, Array
from protocol.plan import Plan
from protocol.privacy.clipping import clipped
from protocol.privacy.noise import noised
from protocol.secure_sum.contribution import Frame, words
from protocol.secure_sum.stages import Asked
from strategies.base_model import find, load
from strategies.data.files import read
from strategies.methods import lora

Optimizer = Literal["sgd", "adamw"]
Ids = tuple[int, ...]
# By layer, what an attacker has of the change of A: rows in the space of the layer's inputs.
Rows = Sequence[Array]

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
LONGEST = 40
RATES: Mapping[Optimizer, float] = {"sgd": 0.1, "adamw": 1e-3}
_PUBLIC = 30  # rows and steps behind the global adapter that the round begins from
_CANDIDATES, _BEAM, _DEPTH = 40, 8, 2
_DRAWS = 8
# Below this share of the largest a direction is rounding: of float32, or of a sum's fixed point.
_FLOOR = 1e-5


class Decoder:
    """The tiny decoder, its rows, and the attack on them.

    Args:
        data: Folder of the test data.
        rank: Of the adapter; alpha is the same.
    """

    def __init__(self, data: Path, rank: int) -> None:
        base = find(str((data / "models" / "stories260k-hf").resolve()))
        plan = Plan(base_model=base.name, lora={"r": rank, "lora_alpha": float(rank), "target_modules": PROJECTIONS})
        bare, tokenizer = load(base, plan)
        torch.manual_seed(0)
        self._model: Any = lora.attach(copy.deepcopy(bare), plan).eval()
        self._layers = self._model.get_base_model().model.layers
        self.modules = lora.modules(self._model)
        with torch.no_grad():
            embedded = self._layers[0].input_layernorm(bare.get_input_embeddings().weight)
        self._vocabulary = embedded.double().numpy()
        self._never = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
        found = [str(raw["text"]) for _, raw in read(data / "classify" / "clinc150_train.jsonl")]
        random.Random(0).shuffle(found)
        ends = (tokenizer.bos_token_id,), (tokenizer.eos_token_id,)
        encoded = ((*ends[0], *tokenizer(text, add_special_tokens=False)["input_ids"], *ends[1]) for text in found)
        self.rows: list[Ids] = [ids for ids in encoded if len(ids) <= LONGEST]
        self.start = lora.extract(self._model)  # B is zero: A would have no gradient
        self.start = self.trained([[ids] for ids in self.rows[-_PUBLIC:]], "adamw", rate=1e-2)

    def trained(self, batches: Sequence[Sequence[Ids]], optimizer: Optimizer, rate: float | None = None) -> Adapter:
        """The adapter after a step for each batch, as a node trains: gradients no longer than 1."""
        lora.load(self._model, self.start)
        tensors = [tensor for tensor in self._model.parameters() if tensor.requires_grad]
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        steps = kind(tensors, lr=rate or RATES[optimizer], weight_decay=0.0)
        for rows in batches:
            ids, labels = batch([Row(row, 0) for row in rows])
            steps.zero_grad()
            self._model(input_ids=ids, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(tensors, 1.0)
            steps.step()
        return lora.extract(self._model)

    # The attack -----------------------------------------------------------------------------------------------------------

    def rows_of(self, changes: Mapping[str, Array]) -> list[Array]:
        """Of each layer what its three projections show of their common inputs, ``(3 r, d_in)``."""
        names = [[n for n in self.modules if f".layers.{at}." in f".{n}"] for at in range(len(self._layers))]
        return [np.concatenate([changes[name] for name in layer]) for layer in names]

    def tokens(self, rows: Rows, count: int) -> list[int]:
        """The ``count`` tokens whose embeddings lie nearest to the span of the first layer's rows."""
        apart = Span(rows[0]).distance(self._vocabulary)
        apart[self._never] = math.inf
        return [int(token) for token in np.argsort(apart, kind="stable")[:count]]

    def sentence(self, rows: Rows, length: int) -> Ids:
        """The row's ``length`` tokens between both ends, from left to right: each next one is what the layers above know."""
        lora.load(self._model, self.start)
        candidates, spans = self.tokens(rows, _CANDIDATES), [Span(layer) for layer in rows[: _DEPTH + 1]]
        beams: list[tuple[float, Ids]] = [(0.0, (self._never[0],))]
        for _ in range(length):
            longer = [(apart, (*ids, token)) for apart, ids in beams for token in candidates]
            with torch.no_grad():
                hidden = self._model.get_base_model().model(
                    input_ids=torch.tensor([ids for _, ids in longer]), output_hidden_states=True, use_cache=False
                )
                last = [
                    layer.input_layernorm(states[:, -1]).double().numpy()
                    for layer, states in zip(self._layers, hidden.hidden_states, strict=False)
                ]
            apart = np.sum([span.distance(states) for span, states in zip(spans, last, strict=False)], axis=0)
            found = [(before + float(own), ids) for (before, ids), own in zip(longer, apart, strict=True)]
            beams = sorted(found)[:_BEAM]
        return beams[0][1][1:]


class Span:
    """The directions that rows stand for, each weighed by how far it is above the smallest.

    Args:
        rows: ``(n, d_in)``.
    """

    def __init__(self, rows: Array) -> None:
        _, sizes, self._directions = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
        least = max(1.5 * float(sizes[-max(1, len(sizes) // 8) :].mean()), _FLOOR * float(sizes[0]), 1e-300)
        self._weights = np.clip(1 - (least / np.maximum(sizes, 1e-300)) ** 2, 0, None)

    def distance(self, vectors: Array) -> Array:
        """Of each vector, ``(n, d_in)``, the share of its square that lies outside."""
        units = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
        apart: Array = 1 - (units @ self._directions.T) ** 2 @ self._weights
        return apart


# What the coordinator sees ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Views:
    """One round with a victim, as an attacker finds it.

    Attributes:
        masked: The victim's masked vector, read as if it were none.
        total: The opened sum.
        noised: The same with client-level noise of multiplier 1, the updates clipped to the median of their norms.
    """

    masked: list[Array]
    total: list[Array]
    noised: list[Array]


def in_the_open(decoder: Decoder, trained: Adapter) -> list[Array]:
    """What an update shows without a secure sum."""
    before = decoder.start.factors
    return decoder.rows_of({name: pair.A - before[name].A for name, pair in trained.factors.items()})


def views(decoder: Decoder, updates: Sequence[tuple[Adapter, int]], examples: int) -> Views:
    """A round's secure sum under fedavg, whose sum holds A's change itself and so tells more than product-delta's.

    Args:
        decoder: Its start is what was sent.
        updates: And the rows behind each; the victim's first.
        examples: Rows that weigh 1.
    """
    names = tuple(f"node-{number:02d}" for number in range(len(updates)))
    asked = Asked(run="0" * 32, nodes=names, kind="tensors", limit=10.0, examples=examples, width=1, share=2 / 3)
    frame = Frame(asked, decoder.modules, {}, decoder.start)
    (terms,), sketch = frame.terms("inversion", 1), frame.sketch()
    own = [frame.innovation(update, decoder.start, {}) for update, _ in updates]
    weighed = [sketch.first(each, frame.weight(count)) for each, (_, count) in zip(own, updates, strict=True)]
    seen = summed(terms, {name: words(terms, vector) for name, vector in zip(names, weighed, strict=True)})

    def rows(vector: Array) -> list[Array]:
        dense = sketch.totalled(np.concatenate([[1.0], vector[1:]]), {}, np.ones(1)).dense
        return decoder.rows_of({name[2:]: change for name, change in dense.items() if name.startswith("A|")})

    clipping_norm = float(np.median([clipped(each, 1.0).norm for each in own]))
    equal = sum(sketch.first(clipped(each, clipping_norm).innovation, 1.0) for each in own)
    return Views(
        masked=rows(terms.fixed_point.decode(seen.masked[names[0]])),
        total=rows(seen.total),
        noised=rows(noised(equal, clipping_norm, clipping_norm)),
    )


# What is found ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A share over victims.

    Attributes:
        mean, error: And half of its 95 % interval.
    """

    mean: float
    error: float

    @classmethod
    def of(cls, shares: Sequence[float]) -> "Found":
        """Of each victim's share."""
        return cls(float(np.mean(shares)), 1.96 * float(np.std(shares, ddof=1)) / math.sqrt(len(shares)))

    def __str__(self) -> str:
        return f"{self.mean:6.3f} ± {self.error:.3f}"


def recovered(decoder: Decoder, rows: Rows, victim: Ids) -> float:
    """Share of the victim's distinct tokens among as many candidates."""
    own = set(victim[1:-1])
    return len(own.intersection(decoder.tokens(rows, len(own)))) / len(own)


def by_chance(decoder: Decoder, rows: Rows, victim: Ids, seed: int) -> float:
    """The same of noise of the same norm, a mean over draws."""
    generator = np.random.default_rng(seed)

    def noise(layer: Array) -> Array:
        drawn = generator.standard_normal(layer.shape)
        return drawn * float(np.linalg.norm(layer) / np.linalg.norm(drawn))

    return float(np.mean([recovered(decoder, [noise(layer) for layer in rows[:1]], victim) for _ in range(_DRAWS)]))


def in_place(decoder: Decoder, rows: Rows, victim: Ids) -> float:
    """Share of the victim's places at which the right token is found."""
    found = decoder.sentence(rows, len(victim) - 2)
    return float(np.mean([one == other for one, other in zip(found, victim[1:-1], strict=True)]))


def opened(decoder: Decoder, victims: int, optimizer: Optimizer, steps: int, *, order: bool) -> dict[str, Found]:
    """The attack on the open updates of nodes with one row."""
    tokens, places, noise = [], [], []
    for number, victim in enumerate(decoder.rows[:victims]):
        rows = in_the_open(decoder, decoder.trained([[victim]] * steps, optimizer))
        tokens.append(recovered(decoder, rows, victim))
        noise.append(by_chance(decoder, rows, victim, number))
        places += [in_place(decoder, rows, victim)] if order else []
    found = {"tokens": Found.of(tokens), "noise": Found.of(noise)}
    return found | ({"in place": Found.of(places)} if order else {})


def hidden(decoder: Decoder, victims: int, nodes: int, rows: int, optimizer: Optimizer, steps: int) -> dict[str, Found]:
    """The attack on a round of a victim with one row beside nodes with more; each against its own chance, victim by victim.

    Returns:
        ``masked``, ``sum`` and ``sum with noise``: shares; ``... over chance``: the differences, of the sum from one in which
        somebody else stands in the victim's place, of the others from noise.
    """
    found: dict[str, list[float]] = {}
    for number, victim in enumerate(decoder.rows[:victims]):
        others = [_dealt(decoder, victims, number * nodes + place, rows, steps) for place in range(nodes)]
        updates = [(decoder.trained(batches, optimizer), rows) for batches in others]
        mine = (decoder.trained([[victim]] * steps, optimizer), 1)
        stand_in = (decoder.trained([others[0][0][:1]] * steps, optimizer), 1)
        with_it, without = (views(decoder, [one, *updates[1:]], rows) for one in (mine, stand_in))
        pairs = {
            "masked": (with_it.masked, by_chance(decoder, with_it.masked, victim, number)),
            "sum": (with_it.total, recovered(decoder, without.total, victim)),
            "sum with noise": (with_it.noised, by_chance(decoder, with_it.noised, victim, number)),
        }
        for name, (seen, chance) in pairs.items():
            share = recovered(decoder, seen, victim)
            found.setdefault(name, []).append(share)
            found.setdefault(f"{name} over chance", []).append(share - chance)
    return {name: Found.of(shares) for name, shares in found.items()}


def _dealt(decoder: Decoder, victims: int, node: int, rows: int, steps: int) -> list[list[Ids]]:
    """A node's batches: its rows in equal parts, or all of them at each step where there are fewer."""
    first = victims + node * rows
    own = [decoder.rows[at % (len(decoder.rows) - _PUBLIC)] for at in range(first, first + rows)]
    size = max(1, rows // steps)
    return [[own[(step * size + at) % rows] for at in range(size)] for step in range(steps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the test data")
    parser.add_argument("--victims", type=int, default=40)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    told = {**dict(_open(options)), **dict(_summed(options))}
    print(json.dumps(told))


def _open(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    print(f"{'open update of one row':>30}{'tokens':>16}{'on noise':>16}{'in place':>16}")
    cases: list[tuple[int, Optimizer, int]] = [(options.rank, kind, steps) for kind in RATES for steps in (1, 8, 32)]
    cases += [(rank, "sgd", 1) for rank in (2, 4, 8, 32) if rank != options.rank]
    decoder = Decoder(options.data, options.rank)
    for rank, optimizer, steps in cases:
        decoder = decoder if rank == options.rank else Decoder(options.data, rank)
        order = (rank, optimizer) == (options.rank, "sgd") and steps < 32
        found = opened(decoder, options.victims, optimizer, steps, order=order)
        name = f"rank {rank}, {steps} x {optimizer}"
        print(f"{name:>30}{found['tokens']!s:>16}{found['noise']!s:>16}{found.get('in place', '')!s:>16}", flush=True)
        yield name, _rounded(found)


def _summed(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    decoder = Decoder(options.data, options.rank)
    kinds = ("masked", "sum", "sum with noise")
    print(f"{'secure sum':>30}" + "".join(f"{kind:>16}{'over chance':>16}" for kind in kinds))
    cases: list[tuple[int, int, Optimizer, int]] = [
        (3, 1, "sgd", 1),
        (3, 32, "sgd", 1),
        (3, 32, "adamw", 8),
        (8, 1, "sgd", 1),
        (8, 32, "sgd", 1),
    ]
    for nodes, rows, optimizer, steps in cases:
        found = hidden(decoder, options.victims, nodes, rows, optimizer, steps)
        name = f"{nodes} nodes of {rows} row(s), {steps} x {optimizer}"
        cells = "".join(f"{found[kind]!s:>16}{found[f'{kind} over chance']!s:>16}" for kind in kinds)
        print(f"{name:>30}{cells}", flush=True)
        yield name, _rounded(found)


def _rounded(found: Mapping[str, Found]) -> dict[str, list[float]]:
    return {name: [round(one.mean, 4), round(one.error, 4)] for name, one in found.items()}


if __name__ == "__main__":
    main()
