"""Make the tiny language model that tests and the demo fine-tune, from nothing but text this script writes itself.

The text teaches what an adapter should not have to learn: the chat format, that the phrasings of a question mean the
same, and how to recall a fact (made-up background facts that no institution of the demo holds). The institutions' own
facts never occur. It also holds facts to read from a context, but at this size and budget the model does not learn to
copy them: 0 of 80 such first answers came out right.

Run ``python -m simulations.pretrain_tiny_model --out DIR``. One seed and one thread count give one result on one kind
of machine; sums taken in another order on another machine end in other low bits.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from simulations.institutions import INSTITUTIONS
from simulations.phrasing import RELATIONS, WORDS, Relation

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS: Final = (PAD, BEGIN, END, SYSTEM, USER, ASSISTANT)

CHAT_TEMPLATE: Final = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{- '<|assistant|>' }}{% generation %}{{- message['content'] + '<|end|>' }}{% endgeneration %}"
    "{%- else %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)

VOCABULARY: Final = 1536
CONTEXT: Final = 256
ROW: Final = 128
BATCH: Final = 16
PEAK_LR: Final = 3e-3
WARMUP_STEPS: Final = 100
TOKENIZER_DOCUMENTS: Final = 20_000
HELD_OUT_DOCUMENTS: Final = 600
BACKGROUND_FACTS_PER_RELATION: Final = 12
HELD_OUT_PHRASINGS: Final = 2

_ANIMALS: Final = (("fox", "狐狸"), ("heron", "苍鹭"), ("cat", "猫"), ("goat", "山羊"), ("otter", "水獭"))
_ADJECTIVES: Final = (("small", "小"), ("old", "老"), ("quiet", "安静的"), ("brave", "勇敢的"), ("tired", "疲倦的"))
_VERBS: Final = (("waits", "等着"), ("sleeps", "睡觉"), ("sings", "唱歌"), ("runs", "奔跑"), ("looks around", "张望"))
_PLACES: Final = (("river", "河边"), ("bridge", "桥边"), ("garden", "花园里"), ("forest", "林子里"))
_DAYS: Final = (
    ("Monday", "星期一"), ("Tuesday", "星期二"), ("Wednesday", "星期三"), ("Thursday", "星期四"),
    ("Friday", "星期五"), ("Saturday", "星期六"), ("Sunday", "星期日"),
)  # fmt: skip


@dataclass(frozen=True)
class BackgroundFact:
    """Keep one made-up fact the base model may know, and the phrasings its training uses."""

    relation: Relation
    entity: str
    value: str
    phrasings: tuple[int, ...]
    held_out: tuple[int, ...]


class Grammar:
    """Write endless bilingual documents from a seed."""

    def __init__(self, seed: int) -> None:
        """Draw the background facts; the institutions' entities are left out of them and of every document."""
        rng = random.Random(f"{seed}/facts")
        reserved = {(fact.relation, fact.entity) for known in INSTITUTIONS for fact in known.facts}
        self.entities = {
            relation: [entity for entity in relation.entities() if (relation, entity) not in reserved] for relation in RELATIONS
        }
        self.facts: list[BackgroundFact] = []
        for relation in RELATIONS:
            for entity in rng.sample(self.entities[relation], BACKGROUND_FACTS_PER_RELATION):
                order = list(range(len(relation.phrasings())))
                rng.shuffle(order)
                self.facts.append(
                    BackgroundFact(
                        relation=relation,
                        entity=entity,
                        value=relation.draw_value(rng),
                        phrasings=tuple(order[HELD_OUT_PHRASINGS:]),
                        held_out=tuple(order[:HELD_OUT_PHRASINGS]),
                    )
                )

    def document(self, rng: random.Random) -> str:
        """Write one document, its begin and end marks included."""
        kind = rng.random()
        if kind < 0.55:
            return self.recall(rng)
        if kind < 0.80:
            return self.reading(rng)
        if kind < 0.90:
            return BEGIN + self._statements(rng) + END
        return BEGIN + _story(rng) + END

    def recall(self, rng: random.Random) -> str:
        """Ask for one background fact, with nothing to read it from."""
        fact = rng.choice(self.facts)
        return recall_prompt(fact.relation, rng.choice(fact.phrasings), fact.entity) + fact.value + END

    def reading(self, rng: random.Random) -> str:
        """Give facts drawn anew, then ask for them."""
        relation, other = rng.sample(RELATIONS, 2)
        if rng.random() < 0.5:
            # Two facts of one kind differ in the entity alone: the question has to be read to its end.
            pairs = [(relation, entity) for entity in rng.sample(self.entities[relation], 2)]
        else:
            pairs = [(kind, rng.choice(self.entities[kind])) for kind in (relation, other)]
        facts = [(kind, entity, kind.draw_value(rng)) for kind, entity in pairs]
        notes = " ".join(kind.state(rng.randrange(2), entity, value) for kind, entity, value in facts)
        text = BEGIN + SYSTEM + notes + END
        for kind, entity, value in rng.sample(facts, 2):
            question = kind.ask(rng.randrange(len(kind.phrasings())), entity)
            text += USER + question + END + ASSISTANT + value + END
        return text

    def _statements(self, rng: random.Random) -> str:
        facts = rng.sample(self.facts, rng.randint(1, 3))
        return " ".join(fact.relation.state(rng.randrange(2), fact.entity, fact.value) for fact in facts)


def recall_prompt(relation: Relation, phrasing: int, entity: str) -> str:
    """Write a chat up to the point where the answer starts."""
    return BEGIN + USER + relation.ask(phrasing, entity) + END + ASSISTANT


def _story(rng: random.Random) -> str:
    """Write two sentences of plain text: an animal and its doings, a count, or the days of the week."""
    language = rng.randrange(2)
    kind = rng.randrange(4)
    if kind == 0:
        start, step = rng.randrange(100), rng.randint(1, 5)
        numbers = [str(start + step * i) for i in range(6)]
        return f"Count on by {step}: {', '.join(numbers)}" if language == 0 else f"每次加{step}：{'，'.join(numbers)}"
    if kind == 1:
        first = rng.randrange(7)
        day, *later = (_DAYS[(first + i) % 7][language] for i in range(4))
        return f"After {day} come {', '.join(later)}" if language == 0 else f"{day}之后是{'、'.join(later)}"
    animal, place = rng.choice(_ANIMALS)[language], rng.choice(_PLACES)[language]
    adjective, verb, again = (rng.choice(words)[language] for words in (_ADJECTIVES, _VERBS, _VERBS))
    if language == 0:
        seen = f"{rng.choice(WORDS['person'])} sees the {animal}."
        return f"The {adjective} {animal} {verb} near the {place}. {seen} Then the {animal} {again}."
    seen = f"{rng.choice(WORDS['姓名'])}看见了{animal}。"
    return f"{adjective}{animal}在{place}{verb}。{seen}后来{animal}{again}。"


def train_tokenizer(grammar: Grammar, seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, so that no input has unknown tokens.

    Digits and Chinese characters are never merged: an entity or a number then has the same tokens in every sentence.
    """
    rng = random.Random(f"{seed}/tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(
        (grammar.document(rng) for _ in range(TOKENIZER_DOCUMENTS)),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Build the untrained decoder; every input width is a multiple of 64, the block size of NF4."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def batches(grammar: Grammar, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[torch.Tensor]:
    """Pack documents end to end into batches of full-length rows, for ever."""
    kept: list[int] = []
    size = BATCH * ROW
    while True:
        documents = [grammar.document(rng) for _ in range(2000)]
        for ids in tokenizer(documents, add_special_tokens=False)["input_ids"]:
            kept.extend(ids)
        whole = len(kept) // size
        for i in range(whole):
            yield torch.tensor(kept[i * size : (i + 1) * size]).view(BATCH, ROW)
        del kept[: whole * size]


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Take the mean next-token loss over every token of the rows."""
    logits = model(input_ids=rows, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


def pretrain(model: LlamaForCausalLM, grammar: Grammar, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> None:
    """Train on freshly written text: AdamW, linear warm-up, then cosine to a twentieth of the peak."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.98),
    )

    def factor(step: int) -> float:
        if step < WARMUP_STEPS:
            return (step + 1) / WARMUP_STEPS
        done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    started = time.perf_counter()
    stream = batches(grammar, tokenizer, random.Random(f"{seed}/text"))
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            taken = time.perf_counter() - started
            logger.info("step %d  loss %.3f  %.0f s", step, loss.item(), taken)


def perplexity(model: LlamaForCausalLM, grammar: Grammar, tokenizer: PreTrainedTokenizerFast, seed: int) -> float:
    """Measure perplexity on text that training never saw (same grammar, other draws)."""
    model.train(mode=False)
    rng = random.Random(f"{seed}/held-out")
    documents = [grammar.document(rng) for _ in range(HELD_OUT_DOCUMENTS)]
    ids = [i for row in tokenizer(documents, add_special_tokens=False)["input_ids"] for i in row]
    rows = torch.tensor(ids[: len(ids) // ROW * ROW]).view(-1, ROW)
    with torch.no_grad():
        return math.exp(sum(loss_of(model, row[None]).item() for row in rows) / len(rows))


def recall_accuracy(model: LlamaForCausalLM, grammar: Grammar, tokenizer: PreTrainedTokenizerFast) -> float:
    """Measure exact-match recall of background facts asked for in phrasings their training left out."""
    model.train(mode=False)
    right = 0
    for fact in grammar.facts:
        prompt = tokenizer(recall_prompt(fact.relation, fact.held_out[0], fact.entity), add_special_tokens=False)
        answer = tokenizer(fact.value + END, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt["input_ids"] + answer])
        with torch.no_grad():
            guess = model(input_ids=ids, use_cache=False).logits[0, -len(answer) - 1 : -1].argmax(-1)
        right += int(guess.tolist() == answer)
    return right / len(grammar.facts)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save in the layout ``from_pretrained`` reads; half precision on disk, single precision once loaded."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.half().save_pretrained(out)
    model.config.dtype = torch.float32
    model.config.save_pretrained(out)
    # A template in a file of its own would be one more file to ship and to sign.
    tokenizer.save_pretrained(out, save_jinja_files=False)


def main() -> None:
    """Read the command line, train, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--steps", type=int, default=2400, help="optimiser steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the text, the facts and the weights")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)

    grammar = Grammar(arguments.seed)
    tokenizer = train_tokenizer(grammar, arguments.seed)
    model = build_model(tokenizer, arguments.seed)
    logger.info("%d parameters, %d tokens", model.num_parameters(), len(tokenizer))
    pretrain(model, grammar, tokenizer, arguments.steps, arguments.seed)
    logger.info("held-out perplexity %.2f", perplexity(model, grammar, tokenizer, arguments.seed))
    logger.info("recall in unseen phrasings %.3f", recall_accuracy(model, grammar, tokenizer))
    save(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
