"""Run lm-evaluation-harness against `quire serve` and on the same weights itself, and compare request by request.

    python benchmarks/lm_eval/compare.py --lm-eval VENV/bin/lm_eval [--items 40] [--json FILE]

Exits 1 if a log-likelihood differs by more than 1e-3, if one side alone finds a continuation greedy, or if a generated
text differs. README.md beside this file says how to make VENV.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quire.tales import MODEL_DIR

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-3
TASKS = ("quire_choice", "quire_rolling", "quire_generate")
WHO = ("king", "queen", "miller", "tailor", "fox", "wolf", "giant", "fisherman", "princess", "shepherd")
WHERE = ("forest", "castle", "mill", "garden", "river", "mountain", "cellar", "village", "tower", "meadow")
WHAT = ("ring", "apple", "key", "sword", "feather", "lamp", "goose", "mirror", "cloak", "spindle")


def make_document(rng: random.Random) -> dict[str, Any]:
    who, other = rng.sample(WHO, 2)
    places, thing = rng.sample(WHERE, 4), rng.choice(WHAT)
    choices = rng.sample(places, 4)
    return {
        "story": f"Once upon a time there was a {who} who had a golden {thing}. The {who} hid the {thing} in the "
        f"{places[0]}, and the {other}, who lived in the {places[1]}, did not know of it.",
        "question": f"Where was the {thing} of the {who}?",
        "choices": [f"In the {place}." for place in choices],
        "answer": choices.index(places[0]),
    }


def write_data(folder: Path, num_items: int) -> None:
    """Made-up stories; a text of the rolling task has 2 to 60 of them, so that some are longer than the context."""
    rng = random.Random(11)

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write("choice_train.jsonl", [make_document(rng) for _ in range(20)])
    write("choice_test.jsonl", [make_document(rng) for _ in range(num_items)])
    write("generate_test.jsonl", [{"story": make_document(rng)["story"]} for _ in range(num_items)])
    texts = []
    for number in (2, 8, 20, 40, 60):
        texts.append({"text": "\n".join(make_document(rng)["story"] for _ in range(number))})
    write("rolling_test.jsonl", texts)


@contextmanager
def served(log: Path) -> Iterator[str]:
    """Base URL of a server with the bundled model in float32, ended at the end."""
    command = [sys.executable, "-u", "-m", "quire", "serve", str(MODEL_DIR), "--dtype", "float32", "--port", "0"]
    with log.open("w") as output:
        server = subprocess.Popen([*command, "--served-model-name", "tales"], stdout=output, stderr=output)
        try:
            while (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())) is None:
                if server.poll() is not None:
                    raise SystemExit(f"The server did not start: {log.read_text()}")
                time.sleep(0.2)
            yield found.group()
        finally:
            server.terminate()
            server.wait()


def evaluate(lm_eval: str, model: str, model_args: str, folder: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """Run the harness as it is; what it recorded of each document, by task."""
    output = folder / name
    subprocess.run(
        [
            lm_eval,
            *("--model", model, "--model_args", model_args),
            *("--include_path", str(folder), "--tasks", ",".join(TASKS)),
            *("--batch_size", "1", "--output_path", str(output), "--log_samples"),
        ],
        check=True,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    samples = {}
    for task in TASKS:
        (path,) = output.rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        samples[task] = sorted(rows, key=lambda row: row["doc_id"])
    return samples


def numbers(responses: Any) -> list[float]:
    """All log-likelihoods in a harness's nested lists, in order; it writes them as text."""
    if isinstance(responses, list):
        return [number for each in responses for number in numbers(each)]
    return [] if str(responses) in ("True", "False") else [float(responses)]


def verdicts(responses: Any) -> list[bool]:
    if isinstance(responses, list):
        return [verdict for each in responses for verdict in verdicts(each)]
    return [str(responses) == "True"] if str(responses) in ("True", "False") else []


def compare(ours: dict[str, list[dict[str, Any]]], peer: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for task in TASKS[:2]:
        pairs = [(one["resps"], other["resps"]) for one, other in zip(ours[task], peer[task], strict=True)]
        differences = [abs(a - b) for one, other in pairs for a, b in zip(numbers(one), numbers(other), strict=True)]
        figures[task] = {
            "log_likelihoods": len(differences),
            "largest_difference": max(differences),
            "over_tolerance": sum(difference > TOLERANCE for difference in differences),
            "other_verdicts_on_greedy": sum(verdicts(one) != verdicts(other) for one, other in pairs),
        }
    texts = [(one["resps"], other["resps"]) for one, other in zip(ours[TASKS[2]], peer[TASKS[2]], strict=True)]
    figures[TASKS[2]] = {"texts": len(texts), "different": sum(one != other for one, other in texts)}
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", required=True, help="the harness's command, of a virtual environment of its own")
    parser.add_argument("--items", type=int, default=40, help="questions and texts to continue (default: 40)")
    parser.add_argument("--tokenizer", default="huggingface", choices=("huggingface", "remote"))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in HERE.glob("*.yaml"):
            shutil.copy(path, folder)
        write_data(folder, args.items)
        # The bundled tokenizer begins each text with a special token. The harness asks for it with an API only if it is
        # told to, and never with the server's tokenizer.
        begins = args.tokenizer == "huggingface"
        tokenizer = f"tokenizer={MODEL_DIR},add_bos_token=True," if begins else ""
        with served(folder / "server.log") as url:
            model_args = (
                f"model=tales,base_url={url}/v1/completions,tokenizer_backend={args.tokenizer},{tokenizer}"
                "num_concurrent=4,max_length=1024"
            )
            ours = evaluate(args.lm_eval, "local-completions", model_args, folder, "quire")
        # The harness keeps two tokens of an API's context back, which moves the windows of long texts.
        model_args = f"pretrained={MODEL_DIR},dtype=float32,max_length=1022,add_bos_token={begins}"
        peer = evaluate(args.lm_eval, "hf", model_args, folder, "hf")
    figures = compare(ours, peer)
    text = json.dumps(figures, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    return int(
        any(task.get("over_tolerance", 0) or task.get("other_verdicts_on_greedy", 0) for task in figures.values())
        or figures[TASKS[2]]["different"] > 0
    )


if __name__ == "__main__":
    sys.exit(main())
