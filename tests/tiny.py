"""The tiny Llama, byte-level tokenizer, chat rows, plan and in-memory split of the tests."""

import json
from pathlib import Path

import numpy as np

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def tiny_config(tokenizer, *, tied: bool = True):
    """The configuration of the tiny Llama."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.2,  # with the default of 0.02, all logits of this model are about equal
        **CONFIG,
    )


def make_model(folder: Path, *, tied: bool = True, dtype: str = "float32", shards: int = 1) -> Path:
    """Save a tiny Llama with random weights, and its tokenizer, as a model folder."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tokenizer, tied=tied)).to(getattr(torch, dtype))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=max(size // shards, 1) if shards > 1 else "5GB")
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer():
    """A byte-level tokenizer with ChatML: every text has exactly one encoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def make_rows(path: Path, count: int = 24) -> Path:
    """Write chat rows that differ in length and in their fraction of supervised tokens."""
    rows = []
    for i in range(count):
        question = f"{i} " + "ask " * (1 + i % 5)
        answer = "yes " * (1 + (i * 7) % 4) + str(i)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns * (1 + i % 2)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_plan(
    folder: Path, world_size: int = 1, documents: int | None = None, *, hardware=None, **settings
):
    """The plan of a run on a model folder; defaults: fp32, no dropout, no packing, CPU ranks.

    `documents`: number of training documents, if the plan shall know the size of the data.
    """
    from pipeline.config.settings import RunSettings
    from pipeline.plan.given.catalogue import cpu_of
    from pipeline.plan.given.data_size import DataSize
    from pipeline.plan.given.shape import read_shape
    from pipeline.plan.plan import make_plan

    values = {
        "model": str(folder),
        "train_data": "train.jsonl",
        "output_dir": "run",
        "lora_r": 4,
        "lora_dropout": 0.0,
        "lr": 1e-3,
        "bf16": False,
        "fp16": False,
        "global_batch_size": 8,
        "batch_size": 1,
        "packing": False,
    }
    run = RunSettings.model_validate(values | settings)
    plan = make_plan(
        run,
        read_shape(str(folder), trust_remote_code=settings.get("trust_remote_code", False)),
        hardware or cpu_of(num_cores=2, memory_bytes=16 * 2**30),
        nodes=1,
        ranks_per_node=world_size,
    )
    if documents is None:
        return plan
    tokens = documents * run.max_length
    size = DataSize(documents=documents, tokens=tokens, longest=None, is_exact=True)
    return plan.with_data(size)


def sequences_of(lengths, supervised, sources=None, *, are_packs: bool = False):
    """Sequences of one document each.

    `lengths` and `supervised`: number of tokens, and of tokens with a label, of each sequence.
    `sources`: for each source, its number of sequences and how often an epoch has each of them.
    """
    from pipeline.data.dataset.sequences import Segment, Sequences

    segments, start = [], 0
    for source, (count, repeats) in enumerate(sources or [(len(lengths), 1)]):
        segments.append(Segment(source=source, start=start, end=start + count, repeats=repeats))
        start += count
    lengths = np.asarray(lengths, np.int64)
    return Sequences(
        segments=tuple(segments),
        offsets=np.arange(len(lengths) + 1),
        tokens=lengths,
        squares=lengths**2,
        supervised=np.asarray(supervised, np.int64),
        are_packs=are_packs,
    )


class Documents:
    """A data set in memory: random documents that differ in length and label mask.

    Lengths are 3 to `longest` - 1 tokens. 259 is the vocabulary size of `make_tokenizer`; its first
    3 ids are special tokens, which the documents do not have.
    """

    def __init__(self, count: int = 40, vocab_size: int = 259, longest: int = 24, seed: int = 0):
        random = np.random.default_rng(seed)
        self.lengths = random.integers(3, longest, count)
        self._ids = [random.integers(3, vocab_size, n).astype(np.int32) for n in self.lengths]
        supervised_fractions = random.uniform(0.1, 0.9, count)
        self._masks = [
            random.random(length) < fraction
            for length, fraction in zip(self.lengths, supervised_fractions, strict=True)
        ]
        for mask in self._masks:
            mask[0] = False  # no token precedes the first and could predict it
            mask[-1] = True  # at least one label in each document
        self.supervised_counts = np.array([mask.sum() for mask in self._masks])
        self.sequences = sequences_of(self.lengths, self.supervised_counts)

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, i: int):
        """Token ids and label mask of a document."""
        return self._ids[i], self._masks[i]

    def sequence(self, i: int):
        """The documents of a sequence: one, as without packing."""
        return [self.document(i)]
