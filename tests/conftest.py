"""Tiny random checkpoints, as transformers writes them, for every test that needs a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

VOCAB_SIZE = 320
PAD, BOS, EOS = "<pad>", "<s>", "</s>"  # ids 0, 1, 2
SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "A quire is a gathering of pages; the pages of a quire are folded and sewn.",
    "Once upon a time there was a king who counted his golden apples every night.",
    "Naïve façade, déjà vu: ünïcödé needs more than one byte. 日本語のテキスト。 🙂🙃",
    'def step(self): return [token for token in {"answer": 42, "other": 3.14}]',
]

TinyCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Test-size matrices are too small to share: on a busy machine the threads would mostly wait for each other."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """`tiny_checkpoint(family, **overrides) -> directory` with random weights, tokenizer and generation_config.json.

    family: "llama", "mistral", "qwen2", "qwen3" or "gpt2". Overrides are fields of its transformers config, and:
        dtype: of the tensors in the file ("float32").
        max_shard_size: as in save_pretrained; small values give shards.
        generation: further fields of generation_config.json.
        seed: of the weights.
    The same arguments give the same directory, so a test must copy it before it changes anything in it.
    """
    made: dict[str, Path] = {}

    def make(family: str, **overrides: Any) -> Path:
        key = json.dumps([family, overrides], sort_keys=True)
        if key not in made:
            directory = tmp_path_factory.mktemp(family)
            write_checkpoint(directory, family, **overrides)
            made[key] = directory
        return made[key]

    return make


def write_checkpoint(
    directory: Path,
    family: str,
    *,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    generation: dict[str, Any] | None = None,
    seed: int = 0,
    **overrides: Any,
) -> None:
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(family, **{**base_config(family), **overrides})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases, which transformers starts at 1 and 0
                parameter.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    write_tokenizer(directory)
    path = directory / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (generation or {})))


def base_config(family: str) -> dict[str, Any]:
    """Grouped queries; weights large enough that the argmax changes from token to token."""
    special = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        return special | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
    common = special | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    return common | {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 32}}.get(family, {})


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE of VOCAB_SIZE tokens that puts <s> before every text."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    ).save_pretrained(directory)
