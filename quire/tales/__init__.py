"""The bundled model: a small Llama trained from scratch on public-domain fairy tales."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent
