"""What a saved demo checkpoint says: its figures, its text, and whether it keeps its promises.

Works on a directory alone, loaded the way a user would load it, so that a figure always describes
the files. Knows nothing of how the model was trained. ``verify`` raises `DemoError` at the first
broken promise.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_moe_corpus import VOCAB_SIZE, WINDOW_TOKENS, Corpus, encode
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, OlmoeForCausalLM, PreTrainedTokenizerFast

SIZE_LIMIT_BYTES = 10_000_000
MEASURED_WINDOWS = 128
WINDOWS_AT_ONCE = 8
GENERATED_TOKENS = 80
# Greedy text of a model this small repeats itself; gibberish differs by words nobody wrote.
MIN_WORDS_IN_SAMPLES = 5
MIN_KNOWN_SHARE = 0.6
PROMPTS = ("def __init__(self", "import os\n", "class TestCase")
WORD = re.compile(r"[A-Za-z_]{2,}")
REQUIRED_FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


class DemoError(Exception):
    """The checkpoint cannot be made, or breaks a promise; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSkew:
    """Routing of held-out tokens in one layer; ratios are to the mean, entropy is in bits."""

    layer: int
    hottest_expert: int
    hottest_ratio: float
    coldest_ratio: float
    entropy_bits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Held-out figures of a saved checkpoint; losses in nats a token."""

    loss: float
    unigram_loss: float
    tokens: int
    skew: tuple[LayerSkew, ...]


def say(line: str) -> None:
    """Print one line at once, so that a redirected log can be followed."""
    print(line, flush=True)


def load(directory: Path) -> tuple[OlmoeForCausalLM, PreTrainedTokenizerFast]:
    """Load a saved checkpoint offline, to compute in float32.

    The weights are the saved bf16 values exactly. Arithmetic in bf16 is many times slower on a CPU
    without matrix units, and the figures would depend on the kernel.
    """
    try:
        model = OlmoeForCausalLM.from_pretrained(
            directory, local_files_only=True, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        message = f"{directory} does not load: {str(error).splitlines()[0]}"
        raise DemoError(message) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        message = f"tokenizer loads as {type(tokenizer).__name__}, not as a fast tokenizer"
        raise DemoError(message)
    return model.train(mode=False), tokenizer


def unigram_loss(train_ids: torch.Tensor, held_out_ids: torch.Tensor) -> float:
    """Return nats a token of a model that knows only how often each token occurs."""
    counts = torch.bincount(train_ids, minlength=VOCAB_SIZE).double() + 1.0
    log_probability = (counts / counts.sum()).log()
    return -log_probability[held_out_ids].mean().item()


def layer_skew(layer: int, counts: torch.Tensor) -> LayerSkew:
    """Return the skew of one layer's routing from (num_experts,) counts of assignments."""
    share = counts.double() / counts.sum()
    entropy = -(share * share.clamp_min(1e-12).log2()).sum()
    return LayerSkew(
        layer=layer,
        hottest_expert=int(share.argmax()),
        hottest_ratio=share.max().item() * len(share),
        coldest_ratio=share.min().item() * len(share),
        entropy_bits=entropy.item(),
    )


@torch.no_grad()
def measure(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> Measurement:
    """Measure loss and routing on ``MEASURED_WINDOWS`` evenly spaced held-out windows."""
    config = model.config
    held_out_ids = encode(tokenizer, corpus.held_out)
    windows = held_out_ids[: len(held_out_ids) // WINDOW_TOKENS * WINDOW_TOKENS]
    windows = windows.view(-1, WINDOW_TOKENS)
    windows = windows[:: max(1, len(windows) // MEASURED_WINDOWS)][:MEASURED_WINDOWS]
    counts = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.long)
    losses: list[float] = []
    for batch in torch.split(windows, WINDOWS_AT_ONCE):
        output = model(input_ids=batch, output_router_logits=True, use_cache=False)
        predicted = output.logits[:, :-1].float().flatten(0, 1)
        target = batch[:, 1:].flatten()
        losses += torch.nn.functional.cross_entropy(predicted, target, reduction="none").tolist()
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices.flatten()
            counts[layer] += torch.bincount(chosen, minlength=config.num_experts)
    return Measurement(
        loss=sum(losses) / len(losses),
        unigram_loss=unigram_loss(encode(tokenizer, corpus.train), windows[:, 1:].flatten()),
        tokens=len(losses),
        skew=tuple(layer_skew(layer, row) for layer, row in enumerate(counts)),
    )


@torch.no_grad()
def sample(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Return the prompt with its greedy continuation."""
    encoded = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=GENERATED_TOKENS,
        do_sample=False,
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def directory_bytes(directory: Path) -> int:
    """Return the size of all files below the directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def skew_table(measured: Measurement) -> str:
    """Return the routing figures as a Markdown table."""
    rows = [
        "| layer | hottest expert | hottest / mean | coldest / mean | entropy, bits |",
        "|---:|---:|---:|---:|---:|",
    ]
    rows += [
        f"| {s.layer} | {s.hottest_expert} | {s.hottest_ratio:.2f} | {s.coldest_ratio:.2f}"
        f" | {s.entropy_bits:.2f} |"
        for s in measured.skew
    ]
    return "\n".join(rows)


def tensor_dtypes(file: Path) -> dict[str, str]:
    """Return the dtype of each tensor by name, from the header alone."""
    try:
        with safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
            return {name: weights.get_slice(name).get_dtype() for name in names}
    except SafetensorError as error:
        message = f"{file} is damaged: {error}"
        raise DemoError(message) from error


def verify_files(directory: Path) -> None:
    """Check names, total size and tensor dtypes; raises DemoError at the first broken promise."""
    missing = [name for name in REQUIRED_FILES if not (directory / name).is_file()]
    if missing:
        message = f"{directory} lacks {', '.join(missing)}; train it first"
        raise DemoError(message)
    size = directory_bytes(directory)
    if size > SIZE_LIMIT_BYTES:
        message = f"{directory} has {size:,} bytes, more than {SIZE_LIMIT_BYTES:,}"
        raise DemoError(message)
    dtypes = tensor_dtypes(directory / "model.safetensors")
    wrong = [name for name, dtype in dtypes.items() if dtype != "BF16"]
    if wrong:
        message = f"{len(wrong)} tensors are not bf16, the first is {wrong[0]}"
        raise DemoError(message)
    say(f"files: {size:,} bytes of at most {SIZE_LIMIT_BYTES:,}, {len(dtypes)} tensors, all bf16")


def verify_words(texts: Sequence[str], corpus: Corpus) -> None:
    """Check that generated text is made of several words that occur in the training text."""
    written = {word for text in texts for word in WORD.findall(text)}
    known = {word for document in corpus.train for word in WORD.findall(document.text)}
    share = len(written & known) / max(1, len(written))
    if len(written) < MIN_WORDS_IN_SAMPLES or share < MIN_KNOWN_SHARE:
        message = f"greedy text has {len(written)} different words, {share:.0%} of them known"
        raise DemoError(message)
    say(f"greedy text of {len(texts)} prompts: {len(written)} different words, {share:.0%} known")


def verify(directory: Path, corpus: Corpus) -> None:
    """Check a saved checkpoint: files, loss, routing, greedy text."""
    verify_files(directory)
    model, tokenizer = load(directory)
    config = model.config
    names = tensor_dtypes(directory / "model.safetensors")
    experts = sum(".mlp.experts." in name for name in names)
    if experts != 3 * config.num_hidden_layers * config.num_experts:
        message = f"{experts} expert tensors; three for each of the experts were expected"
        raise DemoError(message)
    measured = measure(model, tokenizer, corpus)
    say(f"held-out loss: {measured.loss:.3f} nats a token, unigram {measured.unigram_loss:.3f}")
    say(skew_table(measured))
    # Written so that a loss that is not a number fails too.
    if not measured.loss < measured.unigram_loss:
        message = "held-out loss is no better than the unigram baseline"
        raise DemoError(message)
    texts = {prompt: sample(model, tokenizer, prompt) for prompt in PROMPTS}
    say(f"greedy text:\n{texts[PROMPTS[0]]}")
    verify_words([text.removeprefix(prompt) for prompt, text in texts.items()], corpus)
