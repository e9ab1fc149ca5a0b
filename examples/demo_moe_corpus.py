"""The corpus and the tokenizer of the demo checkpoint.

Decides which text the demo model reads and which part is held out. Knows nothing of the model.
Everything follows from the running interpreter and a seed; nothing is fetched from a network, and
no text names a path of the machine.
"""

import hashlib
import pydoc
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
# The trainer numbers special tokens first.
END_OF_TEXT_ID = 0
WINDOW_TOKENS = 256
HELD_OUT_ONE_IN = 25

# Left out: tests and vendored wheels (bulk), tables of codecs and key names (no text to learn),
# build configuration (holds paths of the machine that built the interpreter).
SKIPPED_PARTS = frozenset(
    {
        "__pycache__",
        "_pyrepl",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "lib-dynload")
# Modules without a Python source: their documentation exists only as rendered by pydoc.
COMPILED_MODULES = ("array", "builtins", "cmath", "itertools", "math", "time", "zlib")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text of the corpus; ``name`` holds no path of the machine."""

    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Disjoint documents for training and for measuring, each in sorted order of name."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def library_sources() -> Iterator[Document]:
    """Yield the standard library's modules in sorted order, without ``SKIPPED_PARTS``."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_PARTS.intersection(name.parts):
            continue
        if any(part.startswith(SKIPPED_PREFIXES) for part in name.parts):
            continue
        yield Document(name=name.as_posix(), text=path.read_text(encoding="utf-8"))


def rendered_documentation() -> Iterator[Document]:
    """Yield pydoc's language topics and its pages of ``COMPILED_MODULES``."""
    for topic in sorted(topics.topics):
        yield Document(name=f"pydoc/topics/{topic}", text=topics.topics[topic])
    for module in COMPILED_MODULES:
        # typeshed does not know pydoc.plaintext.
        page = pydoc.render_doc(module, renderer=pydoc.plaintext)  # type: ignore[attr-defined]
        # FILE names a path of this machine; addresses change with every run.
        page = re.sub(r"(?ms)^FILE\n.*\Z", "", page)
        page = re.sub(r" at 0x[0-9a-f]+", "", page)
        yield Document(name=f"pydoc/modules/{module}", text=page)


def build_corpus(seed: int) -> Corpus:
    """Split whole documents by a hash of seed and name, so that no text is on both sides."""
    documents = [d for d in (*library_sources(), *rendered_documentation()) if d.text.strip()]
    train: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        digest = hashlib.sha256(f"{seed}:{document.name}".encode()).digest()
        chosen = int.from_bytes(digest[:8]) % HELD_OUT_ONE_IN == 0
        (held_out if chosen else train).append(document)
    return Corpus(train=tuple(train), held_out=tuple(held_out))


def train_tokenizer(documents: Sequence[Document]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE: every byte has a token, so any prompt can be encoded."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((d.text for d in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=2 * WINDOW_TOKENS,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> torch.Tensor:
    """Return all documents as one row of token ids, each ended by ``END_OF_TEXT``."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch([d.text for d in documents]):
        ids += encoding.ids
        ids.append(END_OF_TEXT_ID)
    return torch.tensor(ids, dtype=torch.long)
