"""Planted faults: each breaks one line of a kernel, and the check that the other tests use must notice."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton_interpreter
from paged_problems import Shape, check, make_problem, run_decode, run_prefill
from sampling_problems import ALL_OPTIONS, random_logits, tensors, uniform_numbers

from quire.kernels.kv_write import kv_write as correct_kv_write
from quire.kernels.log_probs import log_probs as correct_log_probs
from quire.kernels.rms_norm import rms_norm as correct_rms_norm
from quire.kernels.rope import rope as correct_rope
from quire.kernels.sample import sample as correct_sample
from quire.kernels.token_bitmask import apply_token_bitmask as correct_token_bitmask

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the variants are interpreted"),
    pytest.mark.filterwarnings("ignore:All-NaN slice"),
]

DECODE_FAULTS = {
    "foreign values are loaded": (
        "mask=visible[:, None] & dim_mask[None, :]",
        "mask=dim_mask[None, :]",
    ),
    "foreign keys are loaded and scored": (
        'scores = tl.where(visible[None, :], scores, float("-inf"))',
        "scores = scores + 0.0",
    ),
    "the window is one short": ("position >= seq_len - WINDOW", "position > seq_len - WINDOW"),
    "pieces that nobody wrote are merged": ("slot, piece < num_pieces,", "slot, piece < BLOCK_P,"),
    "a piece is looked for in the wrong slot": ("tl.where(piece == 0, sequence,", "tl.where(piece < 0, sequence,"),
    "the last piece is left out": ("last_share - share + 1", "last_share - share"),
    "earlier tiles are not scaled down": ("acc * decay[:, None]", "acc"),
    "a piece stops a tile early": ("in range(begin, end):", "in range(begin, tl.maximum(end - 1, begin + 1)):"),
    "a piece counts as a whole sequence": (
        "is_whole = piece_end - piece_begin == num_tiles",
        "is_whole = num_tiles > 0",
    ),
    "a page is off by one slot": ("(position % BLOCK_SIZE)", "((position + 1) % BLOCK_SIZE)"),
}
PREFILL_FAULTS = {
    "foreign values are loaded": (
        "v = tl.load(v_at, mask=v_mask, other=0.0) if MASKED or HEAD_DIM != BLOCK_D else tl.load(v_at)",
        "v = tl.load(v_at)",
    ),
    "a token does not see itself": ("visible = distance >= 0", "visible = distance > 0"),
    "the window is one long": ("(distance < WINDOW)", "(distance <= WINDOW)"),
    "a row that sees nothing yet becomes NaN": (
        'tl.where(new_highest == float("-inf"), 0.0, new_highest)',
        "new_highest",
    ),
    "a diagonal tile is not masked": ("(first_position + 1) // BLOCK_N", "first_position // BLOCK_N + 1"),
    "a tile that the window cuts is not masked": (
        "tl.cdiv(tl.maximum(kv_end - WINDOW, 0), BLOCK_N)",
        "tl.maximum(kv_end - WINDOW, 0) // BLOCK_N",
    ),
    "tiles go to the wrong sequence": ("+ later <= tile", "+ later < tile"),
    "each head counts as a position": (
        "first_position + row // HEADS_PER_PROGRAM,",
        "first_position + row,",
    ),
}


@pytest.mark.parametrize("fault", DECODE_FAULTS)
def test_faults_in_decode_are_caught(fault: str, triton_device: torch.device, tmp_path: Path) -> None:
    variant = triton_interpreter.load_variant("paged_decode", tmp_path, [DECODE_FAULTS[fault]])
    shape = Shape((1, 1), (600, 20), num_kv_heads=1, group_size=2, head_dim=16, window=580)
    with pytest.raises(AssertionError):
        check(run_decode, make_problem(shape, torch.float32, triton_device), run=variant.paged_decode)


@pytest.mark.parametrize("fault", PREFILL_FAULTS)
def test_faults_in_prefill_are_caught(fault: str, triton_device: torch.device, tmp_path: Path) -> None:
    variant = triton_interpreter.load_variant("paged_prefill", tmp_path, [PREFILL_FAULTS[fault]])
    shape = Shape((90, 11), (150, 20), num_kv_heads=1, group_size=2, head_dim=16, window=70)
    with pytest.raises(AssertionError):
        check(run_prefill, make_problem(shape, torch.float32, triton_device), run=variant.paged_prefill)


def test_without_a_fault_nothing_is_caught(triton_device: torch.device, tmp_path: Path) -> None:
    """The shapes above are right when the kernels are."""
    decode = triton_interpreter.load_variant("paged_decode", tmp_path, [])
    shape = Shape((1, 1), (600, 20), num_kv_heads=1, group_size=2, head_dim=16, window=580)
    check(run_decode, make_problem(shape, torch.float32, triton_device), run=decode.paged_decode)
    prefill = triton_interpreter.load_variant("paged_prefill", tmp_path, [])
    shape = Shape((90, 11), (150, 20), num_kv_heads=1, group_size=2, head_dim=16, window=70)
    check(run_prefill, make_problem(shape, torch.float32, triton_device), run=prefill.paged_prefill)


def norm_differs(run: Callable[..., torch.Tensor]) -> bool:
    x, weight = torch.randn(3, 40), torch.randn(40)
    return not torch.allclose(run(x, weight, 1e-5), correct_rms_norm(x, weight, 1e-5, backend="reference"), atol=1e-5)


def norm_of_zero_differs(run: Callable[..., torch.Tensor]) -> bool:
    return not torch.equal(run(torch.zeros(1, 8), torch.ones(8), 1e-5), torch.zeros(1, 8))


def rotation_differs(run: Callable[..., None]) -> bool:
    heads, expected = torch.randn(3, 3, 16).expand(2, 3, 3, 16).clone()
    arguments = (torch.tensor([1, 0, 2]), torch.randn(3, 16))
    run(heads[:, :2], heads[:, 2:], *arguments)
    correct_rope(expected[:, :2], expected[:, 2:], *arguments, backend="reference")
    return not torch.allclose(heads, expected, atol=1e-5)


def write_differs(run: Callable[..., None]) -> bool:
    caches, expected = torch.full((2, 3, 2, 16, 8), 7.0), torch.full((2, 3, 2, 16, 8), 7.0)
    tokens = torch.randn(2, 4, 2, 8)
    slots = torch.tensor([17, 31, 32, 40])
    run(tokens[0], tokens[1], caches[0], caches[1], slots)
    correct_kv_write(tokens[0], tokens[1], expected[0], expected[1], slots, backend="reference")
    return not torch.equal(caches, expected)


def draws_differ(run: Callable[..., torch.Tensor]) -> bool:
    """On spread and on flat rows, half of them with many ties, and a row at temperature 0 with several largest."""
    for first, spread in enumerate((0.3, 3.0)):
        logits = random_logits(len(ALL_OPTIONS), 3001, spread)
        logits[first::2] = logits[first::2].bfloat16().float()
        logits[1, 17::500] = 20.0  # the row at temperature 0
        arguments = (logits, *tensors(ALL_OPTIONS, logits.device), uniform_numbers(len(logits)))
        if not torch.equal(run(*arguments), correct_sample(*arguments, backend="reference")):
            return True
    return False


def masks_differ(run: Callable[..., None]) -> bool:
    logits, expected = random_logits(3, 5000).expand(2, 3, 5000).clone()
    words = torch.randint(-(2**31), 2**31, (2, 150), generator=torch.Generator().manual_seed(0)).int()
    run(logits, words, torch.tensor([2, 0]))
    correct_token_bitmask(expected, words, torch.tensor([2, 0]), backend="reference")
    return not torch.equal(logits, expected)


def log_probs_differ(run: Callable[..., tuple[torch.Tensor, ...]]) -> bool:
    logits = random_logits(3, 5000)
    logits[1] = logits[1].round()
    arguments = (logits, torch.tensor([7, 4999, 0]), 9)
    results = zip(run(*arguments), correct_log_probs(*arguments, backend="reference"), strict=True)
    return not all(torch.allclose(result, expected, rtol=1e-6) for result, expected in results)


@pytest.mark.parametrize(
    ("op", "old", "new", "differs"),
    [
        ("rms_norm", "axis=1) / DIM", "axis=1) / BLOCK_DIM", norm_differs),
        ("rms_norm", "/ DIM + eps)", "/ DIM)", norm_of_zero_differs),
        ("rope", "first * cos - second * sin", "first * cos + second * sin", rotation_differs),
        ("rope", "(group - num_query_groups) * BLOCK_HEADS", "group * BLOCK_HEADS", rotation_differs),
        ("kv_write", "(slot % BLOCK_SIZE)", "((slot + 1) % BLOCK_SIZE)", write_differs),
        ("kv_write", "tl.store(v_cache + target, values", "tl.store(v_cache + target, keys", write_differs),
        ("sample", "kept = values >= bound", "kept = values > bound", draws_differ),
        ("sample", 'weight = mass_of(values, top, float("-inf"))', "weight = weight * 1.0", draws_differ),
        ("sample", "order_key(bound), k, False", "order_key(bound), k // 2, False", draws_differ),
        ("sample", "tl.where(reaches_third, high, third)", "third", draws_differ),
        ("sample", "bound = tl.maximum(bound, kth)", "bound = bound + 0.0", draws_differ),
        ("sample", "/ vocab_size)", "* vocab_size)", draws_differ),
        ("sample", "threshold = tl.maximum(threshold, nucleus)", "threshold = nucleus", draws_differ),
        ("sample", "+ tl.cumsum(kept.to(tl.int32), 0) - 1", "+ tl.cumsum(kept.to(tl.int32), 0)", draws_differ),
        ("sample", "tiles < chosen_tile, masses", "tiles <= chosen_tile, masses", draws_differ),
        ("sample", "number = number * 0.0", "number = number * 1.0", draws_differ),
        ("sample", "other=0)\n    tl.store(out", "other=0) + 1\n    tl.store(out", draws_differ),
        ("token_bitmask", ">> (token % 32)", ">> (31 - token % 32)", masks_differ),
        ("token_bitmask", "token // 32 < num_words, other=0", "token // 32 < num_words, other=-1", masks_differ),
        ("token_bitmask", "tl.load(rows + entry)", "entry", masks_differ),
        ("log_probs", "0x7FFFFFFF - token_id)", "token_id)", log_probs_differ),
        ("log_probs", "log_total += top.to(tl.float64)", "log_total += 0.0", log_probs_differ),
        ("log_probs", "rank < previous", "rank <= previous", log_probs_differ),
        ("log_probs", "values == bound", "values == top", log_probs_differ),
    ],
)
def test_faults_in_small_operations_are_caught(
    op: str, old: str, new: str, differs: Callable[..., bool], triton_device: torch.device, tmp_path: Path
) -> None:
    assert differs(getattr(triton_interpreter.load_variant(op, tmp_path, [(old, new)]), op))


@pytest.mark.parametrize(
    ("op", "differs"),
    [
        ("rms_norm", norm_differs),
        ("rms_norm", norm_of_zero_differs),
        ("rope", rotation_differs),
        ("kv_write", write_differs),
        ("sample", draws_differ),
        ("token_bitmask", masks_differ),
        ("log_probs", log_probs_differ),
    ],
)
def test_small_operations_without_a_fault(
    op: str, differs: Callable[..., bool], triton_device: torch.device, tmp_path: Path
) -> None:
    assert not differs(getattr(triton_interpreter.load_variant(op, tmp_path, []), op))


NARROW_OFFSETS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch, triton_interpreter
from paged_problems import Shape, far_apart, make_problem, replace, run_decode
folder, wide = Path(sys.argv[2]), "mask=visible, other=0).to(tl.int64)"
with triton_interpreter.interpreted_kernels():
    problem = make_problem(Shape((1,), (200,), num_kv_heads=1, head_dim=16), torch.float16, torch.device("cpu"))
    caches = {name: far_apart(getattr(problem, name), 2**29, folder / name) for name in ("k_cache", "v_cache")}
    new = wide if sys.argv[3] == "wide" else wide.removesuffix(".to(tl.int64)")
    variant = triton_interpreter.load_variant("paged_decode", folder, [(wide, new)])
    result = run_decode(replace(problem, **caches), run=variant.paged_decode)
    sys.exit(0 if torch.equal(result, run_decode(problem, backend="triton")) else 3)
"""


@pytest.mark.parametrize("offsets", ["wide", "narrow"])
def test_32_bit_offsets_are_caught(offsets: str, tmp_path: Path) -> None:
    """They wrap around to addresses outside the cache: a wrong result or a crash, so it has a process of its own."""
    command = [sys.executable, "-c", NARROW_OFFSETS, str(Path(__file__).parent), str(tmp_path), offsets]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    expected = (0,) if offsets == "wide" else (3, -signal.SIGSEGV, -signal.SIGBUS)
    assert done.returncode in expected, done.stderr
