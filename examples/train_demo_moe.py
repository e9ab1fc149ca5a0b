"""Train the demo checkpoint: a small OLMoE that has read the Python standard library.

Usage:
    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 nice -n 5 python examples/train_demo_moe.py
    python examples/train_demo_moe.py --minutes 2 --output /tmp/demo-moe
    python examples/train_demo_moe.py --check

Why it exists: every example and test of hotset needs a real Mixture-of-Experts checkpoint whose
experts are not equally hot, in the layout published models use, small enough to keep in git. A
checkpoint with random weights has no text to look at and no skew worth planning for.

What it does: builds a corpus from the running interpreter's standard library, trains a byte-level
BPE on it, trains the model until the time budget is used, saves bf16 weights, and writes a model
card holding figures measured on the *saved* files, not on the model in memory.

What is reproducible: the corpus, its held-out part, the tokenizer and the order of batches follow
from the interpreter and ``--seed``. The number of steps follows from the clock, hence two runs
give different weights. Nothing is fetched from a network.

Invariants: the output directory is either the old checkpoint or the complete new one (written
beside it, then renamed); a directory that is no demo checkpoint is never replaced; at most
10 MB are written. ``--check`` exits 1 when a saved checkpoint breaks a promise.
"""

import argparse
import math
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import tokenizers
import torch
import transformers
from demo_moe_corpus import (
    END_OF_TEXT_ID,
    VOCAB_SIZE,
    WINDOW_TOKENS,
    Corpus,
    build_corpus,
    encode,
    train_tokenizer,
)
from demo_moe_measure import (
    PROMPTS,
    DemoError,
    load,
    measure,
    sample,
    say,
    skew_table,
    verify,
)
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

DEFAULT_OUTPUT = Path(__file__).resolve().parent / "demo-moe"
MAX_MINUTES = 60.0
MAX_SEED = 2**32 - 1

# Measured throughput is highest at eight windows (8.0 thousand tokens a second; 7.4 at 16, 6.1 at
# 32), and a run of minutes needs many updates more than smooth gradients.
BATCH_WINDOWS = 8
PEAK_LEARNING_RATE = 3e-3
WARMUP_FRACTION = 0.03
FINAL_RATE_FRACTION = 0.03
# Early on a weak penalty lets half of the experts die; kept to the end, one that saves them makes
# all equally hot. So it is firm until experts differ, then small: the demo is about skew.
EARLY_BALANCE = 0.02
LATE_BALANCE = 0.001
EARLY_FRACTION = 0.2
REPORT_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecord:
    """What the training run cost; ``minutes`` is wall time of the loop alone."""

    steps: int
    tokens: int
    corpus_tokens: int
    minutes: float


def build_model(seed: int) -> OlmoeForCausalLM:
    """Return the untrained model, 4.2 million parameters of which 3.5 million are experts."""
    config = OlmoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        # Without renormalising, a fresh router scales every expert by about 1/16 and a run of
        # minutes ends before the experts matter.
        norm_topk_prob=True,
        # The usual 0.02 is meant for wide models; at width 128 it is a slow start.
        initializer_range=0.05,
        tie_word_embeddings=True,
        max_position_embeddings=2 * WINDOW_TOKENS,
        # Zero turns the model's own penalty off; see balance_penalty.
        router_aux_loss_coef=0.0,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )
    torch.manual_seed(seed)
    model = OlmoeForCausalLM(config)
    # Measured on two cores at 16 windows: grouped_mm 7.4, eager 6.7 thousand tokens a second;
    # batched_mm copies expert weights for each token and did not end eight steps in two minutes.
    model.set_experts_implementation("grouped_mm")
    return model


def rate_at(progress: float) -> float:
    """Return the learning rate after a fraction of the budget: linear warmup, then cosine."""
    if progress < WARMUP_FRACTION:
        return PEAK_LEARNING_RATE * progress / WARMUP_FRACTION
    done = min(1.0, (progress - WARMUP_FRACTION) / (1.0 - WARMUP_FRACTION))
    cosine = 0.5 * (1.0 + math.cos(math.pi * done))
    return PEAK_LEARNING_RATE * (FINAL_RATE_FRACTION + (1.0 - FINAL_RATE_FRACTION) * cosine)


def batches(ids: torch.Tensor, *, seed: int) -> Iterator[torch.Tensor]:
    """Yield (BATCH_WINDOWS, WINDOW_TOKENS) batches without end.

    An epoch reads each token once; each epoch has its own order and its own offset, so that
    windows are cut at different places.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(WINDOW_TOKENS, (1,), generator=generator))
        usable = (len(ids) - offset) // WINDOW_TOKENS * WINDOW_TOKENS
        windows = ids[offset : offset + usable].view(-1, WINDOW_TOKENS)
        order = torch.randperm(len(windows), generator=generator)
        for chosen in torch.split(order, BATCH_WINDOWS):
            if len(chosen) == BATCH_WINDOWS:
                yield windows[chosen]


def build_optimizer(model: OlmoeForCausalLM) -> torch.optim.Optimizer:
    """Return AdamW that decays matrices and leaves the gains of norms alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def balance_penalty(config: OlmoeConfig, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the Switch Transformer balance loss, averaged over layers.

    The model's own penalty adds all layers up before it compares experts, so expert 3 may be dead
    in one layer as long as another layer overuses its own expert 3. Here each layer answers for
    itself.
    """
    layers = [
        torch.as_tensor(
            load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
        )
        for logits in router_logits
    ]
    return torch.stack(layers).mean()


def train(
    model: OlmoeForCausalLM, *, ids: torch.Tensor, seed: int, minutes: float
) -> TrainingRecord:
    """Train in place until ``minutes`` of wall time have passed."""
    optimizer = build_optimizer(model)
    model.train()
    budget_s = minutes * 60.0
    started_s = reported_s = time.monotonic()
    steps = 0
    for steps, batch in enumerate(batches(ids, seed=seed), start=1):
        # At zero on the clock the rate would be zero and the first update lost.
        progress = max(time.monotonic() - started_s, 0.1) / budget_s
        for group in optimizer.param_groups:
            group["lr"] = rate_at(progress)
        balance = EARLY_BALANCE if progress < EARLY_FRACTION else LATE_BALANCE
        output = model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False)
        loss = output.loss
        (loss + balance * balance_penalty(model.config, output.router_logits)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        now_s = time.monotonic()
        if now_s - reported_s >= REPORT_SECONDS:
            reported_s = now_s
            rate = steps * batch.numel() / (now_s - started_s)
            say(
                f"{now_s - started_s:5.0f} s  step {steps:5d}  loss {loss.item():.3f}"
                f"  {rate:.0f} tokens/s"
            )
        if not math.isfinite(loss.item()):
            message = f"training diverged at step {steps}; try another --seed"
            raise DemoError(message)
        if now_s - started_s >= budget_s:
            break
    return TrainingRecord(
        steps=steps,
        tokens=steps * BATCH_WINDOWS * WINDOW_TOKENS,
        corpus_tokens=len(ids),
        minutes=(time.monotonic() - started_s) / 60.0,
    )


CARD = """\
---
license: psf-2.0
library_name: transformers
pipeline_tag: text-generation
---
# demo-moe

A Mixture-of-Experts language model of {parameters:.1f} million parameters in the OLMoE
architecture, made so that hotset has a real checkpoint to load, place and move: experts in the
layout published models use, routing that is skewed, text that can be looked at. It repeats itself
and knows nothing. Do not use it for anything else.

## What it is

{layers} layers, hidden size {hidden}, {experts} experts a layer of intermediate size {inner},
top-{top_k} routing with renormalised weights, {heads} attention heads, tied embeddings, byte-level
BPE of {vocab} tokens, trained on windows of {window} tokens. Weights are bf16 in one
`model.safetensors` ({weight_bytes:,} bytes), one tensor for each projection of each expert:
`model.layers.L.mlp.experts.E.gate_proj.weight`, `up_proj`, `down_proj`. The router is
`model.layers.L.mlp.gate.weight`. `lm_head` is tied to the embeddings and not stored.

## How it was made

    {command}

Trained from scratch on the standard library of Python {python} ({documents} documents,
{corpus_tokens:,} tokens): its sources without tests, pydoc's language topics, and pydoc's pages of
a few compiled modules. {steps:,} steps of {batch} windows, {trained_tokens:,} tokens in
{minutes:.1f} minutes on {threads} threads of a shared {machine} CPU
({rate:,.0f} tokens a second), AdamW, cosine decay over the time budget, load-balance coefficient
(each layer on its own) {early} for the first {early_percent:.0f} % of the time and {late} after
that, seed {seed}. torch {torch}, transformers {transformers}, tokenizers {tokenizers}. The number
of steps follows from the clock: another run gives other weights.

## Figures

Measured on the weights saved here, computed in float32, on {held_out_tokens:,} tokens of
documents that were not trained on:

- held-out loss **{loss:.3f} nats a token**; a unigram model has {unigram:.3f}
- routing, where evenly used experts would give ratio 1.00 and {even_bits:.2f} bits:

{skew}

`python examples/train_demo_moe.py --check` measures them again; with another release of Python
the text, and so the figures, differ.

## Greedy samples

{samples}

## Licence

The training text is part of CPython and under the
[Python Software Foundation License](https://docs.python.org/3/license.html), version 2; the
tokenizer and the weights derive from it and are offered under the same terms.
"""


def write_card(
    directory: Path, *, arguments: argparse.Namespace, corpus: Corpus, record: TrainingRecord
) -> None:
    """Measure the checkpoint saved in ``directory`` and write its README.md."""
    model, tokenizer = load(directory)
    measured = measure(model, tokenizer, corpus)
    config = model.config
    texts = [sample(model, tokenizer, prompt).rstrip() for prompt in PROMPTS]
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        experts=config.num_experts,
        inner=config.intermediate_size,
        top_k=config.num_experts_per_tok,
        heads=config.num_attention_heads,
        vocab=VOCAB_SIZE,
        window=WINDOW_TOKENS,
        weight_bytes=(directory / "model.safetensors").stat().st_size,
        command="python examples/train_demo_moe.py"
        f" --minutes {arguments.minutes:g} --seed {arguments.seed} --threads {arguments.threads}",
        python=platform.python_version(),
        documents=len(corpus.train),
        corpus_tokens=record.corpus_tokens,
        steps=record.steps,
        batch=BATCH_WINDOWS,
        trained_tokens=record.tokens,
        minutes=record.minutes,
        threads=arguments.threads,
        machine=platform.machine(),
        rate=record.tokens / (record.minutes * 60.0),
        early=EARLY_BALANCE,
        early_percent=100 * EARLY_FRACTION,
        late=LATE_BALANCE,
        seed=arguments.seed,
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
        held_out_tokens=measured.tokens,
        loss=measured.loss,
        unigram=measured.unigram_loss,
        even_bits=math.log2(config.num_experts),
        skew=skew_table(measured),
        samples="\n\n".join(f"```text\n{text}\n```" for text in texts),
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


def neighbour(output: Path, suffix: str) -> Path:
    """Return the hidden sibling of ``output`` that a run uses while it replaces it."""
    return output.with_name(f".{output.name}.{suffix}")


def prepare(output: Path) -> None:
    """Undo what an interrupted run left, and refuse an output that must not be replaced."""
    if not output.parent.is_dir():
        message = f"{output.parent} is not a directory; create it first"
        raise DemoError(message)
    partial, previous = neighbour(output, "partial"), neighbour(output, "previous")
    if partial.exists():
        say(f"removing {partial.name}, left by an earlier run")
        shutil.rmtree(partial)
    if previous.exists() and not output.exists():
        say(f"restoring {output.name} from an interrupted run")
        previous.rename(output)
    if output.exists() and not (output / "config.json").is_file():
        message = f"{output} exists and is no checkpoint; choose another --output"
        raise DemoError(message)


def replace(partial: Path, output: Path) -> None:
    """Put the complete new directory in place of the old one."""
    previous = neighbour(output, "previous")
    if previous.exists():
        shutil.rmtree(previous)
    if output.exists():
        output.rename(previous)
    partial.rename(output)
    if previous.exists():
        shutil.rmtree(previous)


def make(arguments: argparse.Namespace) -> None:
    """Train a checkpoint and put it at ``arguments.output``."""
    started_s = time.monotonic()
    output: Path = arguments.output
    prepare(output)
    corpus = build_corpus(arguments.seed)
    tokenizer = train_tokenizer(corpus.train)
    ids = encode(tokenizer, corpus.train)
    say(
        f"corpus: {len(corpus.train)} documents, {len(ids):,} tokens;"
        f" {len(corpus.held_out)} documents held out; training for {arguments.minutes:g} minutes"
    )
    model = build_model(arguments.seed)
    record = train(model, ids=ids, seed=arguments.seed, minutes=arguments.minutes)
    partial = neighbour(output, "partial")
    partial.mkdir()
    model.bfloat16().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    write_card(partial, arguments=arguments, corpus=corpus, record=record)
    try:
        verify(partial, corpus)
    except DemoError as error:
        message = f"{error}; {output.name} is untouched, the rejected one is {partial.name}"
        raise DemoError(message) from error
    replace(partial, output)
    say(f"saved {output.name} after {(time.monotonic() - started_s) / 60.0:.1f} minutes in all")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        """Exit 2 with the message."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def minutes_argument(text: str) -> float:
    """Parse a number of minutes above 0 and at most ``MAX_MINUTES``."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0.0 < minutes <= MAX_MINUTES:
        message = f"{text!r} is not a number above 0 and at most {MAX_MINUTES:g}"
        raise argparse.ArgumentTypeError(message)
    return minutes


def whole_number(text: str, *, low: int, high: int) -> int:
    """Parse a decimal integer within [low, high]."""
    if not re.fullmatch(r"[0-9]{1,10}", text) or not low <= int(text) <= high:
        message = f"{text!r} is not a whole number from {low} to {high}"
        raise argparse.ArgumentTypeError(message)
    return int(text)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a bad one exits 2 with one line."""
    parser = OneLineParser(
        prog="train_demo_moe.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--minutes",
        type=minutes_argument,
        default=9.0,
        help="wall time of the training loop; everything else takes about one more (default 9)",
    )
    parser.add_argument(
        "--seed",
        type=lambda text: whole_number(text, low=0, high=MAX_SEED),
        default=0,
        help="of the held-out split, the initial weights and the batches (default 0)",
    )
    parser.add_argument(
        "--threads",
        type=lambda text: whole_number(text, low=1, high=1024),
        default=2,
        help="CPU threads of torch (default 2)",
    )
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, help="directory (default demo-moe here)"
    )
    parser.add_argument(
        "--check", action="store_true", help="verify the saved directory instead; train nothing"
    )
    arguments = parser.parse_args(argv)
    arguments.output = arguments.output.resolve()
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 is success, 1 a broken promise, 2 a bad command line, 130 Ctrl-C."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        if arguments.check:
            verify(arguments.output, build_corpus(arguments.seed))
            say("check passed")
        else:
            make(arguments)
    except (DemoError, OSError) as error:
        sys.stderr.write(f"train_demo_moe.py: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"train_demo_moe.py: interrupted; {arguments.output.name} is untouched\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
