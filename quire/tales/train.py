"""Train the bundled model from scratch: a small Llama that tells fairy tales, on a plain CPU, in about an hour.

The corpus is plain text, one paragraph a line, with an empty line between books. Wall-clock time, not a number of
steps, drives the learning rate, so a run ends when it was told to, however busy the machine is.
"""

import argparse
import json
import lzma
import math
import os
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    logging,
)

from quire.tales import MODEL_DIR

END = "<|endoftext|>"
HELD_OUT = 0.05

# A book ends where its editor's notes or errata begin.
NOTES = re.compile(r"(Sources?|Parallels|Remarks)\.--|Page \d+--")

# The corpus has no titles, so a tale begins where a paragraph opens like one. Fables capitalise their animals, which
# is what "A Fox", "An Ass" and "Two Frogs" look for.
OPENING = re.compile(
    r"['\"]?("
    r"Once (upon|on) a time|Once there |Once,? (a|an|when) |Long(, long)? (ago|time ago)|"
    r"There (was|were|lived|dwelt|once) |In (a certain|olden|old|the old) |"
    r"(A|An|Two|Three|Some) (certain |[A-Z][a-z]+))"
)


@dataclass
class Corpus:
    train: list[str]  # one entry a tale
    held_out: list[str]  # one entry a book: its last paragraphs


def read_corpus(path: Path) -> Corpus:
    raw = path.read_bytes()
    text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode()
    corpus = Corpus([], [])
    for book in re.split(r"\n\s*\n", text.strip()):
        paragraphs = book.split("\n")
        notes = (i for i, paragraph in enumerate(paragraphs) if NOTES.match(paragraph))
        paragraphs = paragraphs[: next(notes, None)]
        total, seen, cut = sum(map(len, paragraphs)), 0, 0
        while seen < total * (1 - HELD_OUT):
            seen += len(paragraphs[cut])
            cut += 1
        corpus.train += split_tales(paragraphs[:cut])
        corpus.held_out.append(END.join(split_tales(paragraphs[cut:])))
    return corpus


def split_tales(paragraphs: list[str]) -> list[str]:
    tales: list[list[str]] = []
    for paragraph in paragraphs:
        if not tales or OPENING.match(paragraph):
            tales.append([])
        tales[-1].append(paragraph)
    return ["\n".join(tale) for tale in tales]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Every prompt starts a text, as Llama's do: <|endoftext|> is what stands before a tale in training.
    start = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), start])
    return tokenizer


def build_model(args: argparse.Namespace, tokenizer: Tokenizer) -> LlamaForCausalLM:
    end_id = tokenizer.token_to_id(END)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 32,
        num_key_value_heads=args.hidden_size // 64,
        head_dim=32,
        max_position_embeddings=args.window,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=end_id,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    add_dropout(model, args.dropout)
    return model


def add_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Drop activations where they enter the residual stream, which Llama does not do by itself."""

    def drop(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, probability, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def batches(tales: list[list[int]], window: int, batch_size: int, rng: random.Random) -> Iterator[torch.Tensor]:
    """Endless [batch_size, window + 1] pieces; each epoch puts the tales in a new order and cuts it elsewhere."""
    while True:
        rng.shuffle(tales)
        tokens = torch.tensor([token for tale in tales for token in tale])
        tokens = tokens.roll(rng.randrange(len(tokens)))
        pieces = tokens.unfold(0, window + 1, window)
        for rows in torch.randperm(len(pieces)).split(batch_size)[:-1]:
            yield pieces[rows]


def cross_entropy(model: LlamaForCausalLM, pieces: torch.Tensor) -> torch.Tensor:
    """Loss of each token of [batch, length] pieces given those before it: [batch * (length - 1)]."""
    logits = model(input_ids=pieces[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten(), reduction="none")


@dataclass
class Score:
    nats: float
    tokens: int
    bytes: int

    def __str__(self) -> str:
        perplexity, bits = math.exp(self.nats / self.tokens), self.nats / math.log(2) / self.bytes
        return f"perplexity {perplexity:.3f} a token, {bits:.4f} bits a byte ({self.tokens} tokens, {self.bytes} bytes)"


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: list[str], window: int, stride: int) -> Score:
    """Score every token of the texts once, each but the first ones after at least `window - stride` others."""
    was_training = model.training
    model.eval()
    score = Score(0.0, 0, sum(len(text.replace(END, "").encode()) for text in texts))
    for text in texts:
        tokens = torch.tensor(tokenizer.encode(text).ids)
        scored = 0
        while scored < len(tokens) - 1:
            end = min(max(window, scored + stride), len(tokens) - 1)
            losses = cross_entropy(model, tokens[None, max(0, end - window) : end + 1])
            score.nats += losses[-(end - scored) :].double().sum().item()
            score.tokens += end - scored
            scored = end
    model.train(was_training)
    return score


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig.from_dict(model.config.to_dict())
    served = LlamaForCausalLM(config)
    served.load_state_dict(model.state_dict())
    served.to(torch.bfloat16)
    end_id = tokenizer.token_to_id(END)
    served.generation_config = GenerationConfig(
        bos_token_id=end_id, eos_token_id=end_id, pad_token_id=end_id, do_sample=True, temperature=0.8, top_p=0.95
    )
    served.save_pretrained(out)
    # Readers older than transformers 5 look for these two at the top level.
    path = out / "config.json"
    fields = json.loads(path.read_text()) | {"rope_theta": 10000.0, "torch_dtype": "bfloat16"}
    path.write_text(json.dumps(dict(sorted(fields.items())), indent=2) + "\n")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)


def learning_rate(progress: float, peak: float, warm_up: float) -> float:
    """Linear warm-up, then a cosine to a fiftieth; progress is the share of the time that is over."""
    if progress < warm_up:
        return peak * (progress / warm_up + 1e-3)
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - warm_up) / (1 - warm_up)))
    return peak * (0.02 + 0.98 * cosine)


def optimizer_for(model: LlamaForCausalLM, weight_decay: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)


def train(args: argparse.Namespace, corpus: Corpus, tokenizer: Tokenizer, model: LlamaForCausalLM) -> None:
    tales = [encoding.ids for encoding in tokenizer.encode_batch(corpus.train)]  # each starts with END
    optimizer = optimizer_for(model, args.weight_decay)
    step, before = 0, 0.0  # seconds spent by the runs that this one resumes
    if args.resume:
        step, before = load_state(args.checkpoints, model, optimizer)
    num_tokens, num_parameters = sum(map(len, tales)), sum(p.numel() for p in model.parameters())
    print(f"{num_parameters:,} parameters, {len(tales):,} tales, {num_tokens:,} tokens", flush=True)

    started = time.monotonic() - before
    saved = time.monotonic()
    average = math.log(args.vocab_size)
    model.train()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns) as bar:
        task = bar.add_task("starting", total=args.minutes * 60)
        for pieces in batches(tales, args.window, args.batch_size, random.Random(args.seed + step)):
            progress = (time.monotonic() - started) / (args.minutes * 60)
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, args.learning_rate, args.warm_up)
            loss = cross_entropy(model, pieces).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            step += 1
            average += (loss.item() - average) * max(0.02, 1 / step)
            seconds = time.monotonic() - started
            seen = step * args.batch_size * args.window
            line = f"step {step}, epoch {seen / num_tokens:.2f}, loss {average:.3f}, {seen / seconds:,.0f} tokens/s"
            bar.update(task, completed=seconds, description=line)
            if time.monotonic() - saved > args.save_every * 60:
                save_state(args.checkpoints, model, optimizer, step, seconds)
                export(model, tokenizer, args.checkpoints / "model")
                score = evaluate(model, tokenizer, corpus.held_out, args.window, args.window)
                bar.console.print(f"{seconds / 60:.1f} min, {line}; held out: {score}", soft_wrap=True)
                saved = time.monotonic()
    print(f"{step} steps of {args.batch_size} x {args.window} tokens, {step * args.batch_size * args.window:,} in all")


def save_state(folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, step: int, seconds: float) -> None:
    """What --resume needs; written beside the old state and then put in its place, so that one of them is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": parameter.data for name, parameter in model.named_parameters()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    save_file(tensors, folder / "state.partial", {"step": str(step), "seconds": str(seconds)})
    os.replace(folder / "state.partial", folder / "state.safetensors")


def load_state(folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> tuple[int, float]:
    """Put back what save_state kept; the steps and seconds of training that are in it."""
    values: dict[int, dict[str, torch.Tensor]] = {}
    with safe_open(folder / "state.safetensors", "pt") as file:
        model.load_state_dict({n: file.get_tensor(f"model.{n}") for n, _ in model.named_parameters()}, strict=False)
        for key in sorted(file.keys()):
            kind, index, name = key.split(".", 2)
            if kind == "optimizer":
                values.setdefault(int(index), {})[name] = file.get_tensor(key)
        about = file.metadata()
    optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(about["step"]), float(about["seconds"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m quire.tales.train", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="text file, .txt or .txt.xz")
    add("--out", type=Path, default=MODEL_DIR, help="folder for the finished model")
    add("--checkpoints", type=Path, default=Path("build/tales"), help="folder for what is saved on the way")
    add("--resume", action="store_true", help="go on from the state in --checkpoints")
    add("--evaluate", action="store_true", help="train nothing: score the model in --out on the held-out text")
    add("--minutes", type=float, default=60.0, help="length of the training, in minutes of wall-clock time")
    add("--save-every", type=float, default=5.0, help="minutes between checkpoints")
    add("--threads", type=int, default=os.cpu_count() or 1, help="threads for torch")
    add("--seed", type=int, default=0, help="seed of the weights, the dropout and the order of tales")
    add("--vocab-size", type=int, default=4096, help="entries of the tokenizer")
    add("--hidden-size", type=int, default=256, help="width of the model, a multiple of 64")
    add("--intermediate-size", type=int, default=704, help="width of the feed-forward layers")
    add("--layers", type=int, default=6, help="number of layers")
    add("--window", type=int, default=1024, help="tokens in a training piece, and the longest context of the model")
    add("--batch-size", type=int, default=2, help="pieces in a step")
    add("--learning-rate", type=float, default=1.5e-3, help="highest learning rate of AdamW")
    add("--warm-up", type=float, default=0.03, help="share of the time that the learning rate rises")
    add("--weight-decay", type=float, default=0.1, help="weight decay of the matrices")
    add("--dropout", type=float, default=0.1, help="dropout on what enters the residual stream, 0 to 1")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    corpus = read_corpus(args.corpus)
    if not args.evaluate:
        tokenizer = train_tokenizer(corpus.train, args.vocab_size)
        model = build_model(args, tokenizer)
        train(args, corpus, tokenizer, model)
        export(model, tokenizer, args.out)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    served = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    score = evaluate(served, tokenizer, corpus.held_out, args.window, args.window // 2)
    print(f"held out, {args.out.name} as served: {score}")


if __name__ == "__main__":
    main()
