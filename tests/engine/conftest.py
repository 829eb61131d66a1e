"""Tokenizers of each kind, trained on the spot, and an engine process with a fake engine in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Once upon a time there was a king who had a daughter.",
    "Grüße aus Köln: Äpfel, Öl, Übermut, Straße. L'été où naïve façade coûtait très cher.",
    "日本語のテキスト、中文文本，한국어 텍스트. Быстрая лиса прыгает через ленивую собаку.",
    "def main() -> None:\n    print('hello', end='')\n\treturn  None\n",
    "👋 😀 👍 are common; so are 3.14159, 1,000,000 and e\u0301.",
] * 8
BYTE_LEVEL_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="session")
def byte_level_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE like GPT-2's, with special tokens, an ordinary added token, and one that begins each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(BYTE_LEVEL_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False)])
    start = processors.TemplateProcessing(
        single=f"{BYTE_LEVEL_SPECIAL[0]} $A", special_tokens=[(BYTE_LEVEL_SPECIAL[0], 0)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), start])
    directory = tmp_path_factory.mktemp("byte_level")
    return _save(
        directory,
        tokenizer,
        {"bos_token": "<|endoftext|>", "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}},
    )


@pytest.fixture(scope="session")
def byte_fallback_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SentencePiece-like BPE as Llama 2 has it: a mark for spaces, byte tokens for what the vocabulary lacks."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        [text for text in CORPUS if text.isascii()], trainers.BpeTrainer(vocab_size=300, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    bpe = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[tuple(merge) for merge in model["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in pieces[:3]])
    directory = tmp_path_factory.mktemp("byte_fallback")
    return _save(directory, tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


@pytest.fixture(scope="session")
def word_piece_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WordPiece as BERT has it: its decoder does not work by bytes."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _save(tmp_path_factory.mktemp("word_piece"), tokenizer, {"unk_token": "[UNK]"})


@pytest.fixture(scope="session")
def unigram_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unigram as T5 has it: its decoder strips the space of whichever token comes first."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _save(tmp_path_factory.mktemp("unigram"), tokenizer, {"eos_token": "</s>", "unk_token": "<unk>"})


@pytest.fixture(scope="session")
def fake_engine_command() -> list[str]:
    """What starts an engine process that serves tests/engine/fake_engine.py instead of a model."""
    return [sys.executable, str(Path(__file__).with_name("fake_engine.py"))]


def _save(directory: Path, tokenizer: Tokenizer, config: dict[str, object]) -> Path:
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
