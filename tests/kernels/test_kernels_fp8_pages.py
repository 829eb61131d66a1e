"""fp8 pages: writing against the quantizer in plain torch, attention against float64 of what the codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
import triton_interpreter
from paged_problems import Shape, check, make_problem, run_decode, run_prefill

from quire.kernels.kv_write import kv_write
from quire.kernels.quantization import LARGEST_CODE, quantize, read_slots
from quire.kernels.targets import A100, B200, H100, MI300

Attend = Callable[..., torch.Tensor]

FP8, FP8_OF_AMD = torch.float8_e4m3fn, torch.float8_e4m3fnuz  # the interpreter does not know the second
DECODES = [
    Shape((1,) * 5, (1, 0, 16, 17, 300), group_size=3, head_dim=64),
    Shape((1,) * 2, (61, 200), num_kv_heads=1, group_size=5, head_dim=36, block_size=8, window=33),
    *(
        Shape((1,) * 2, (130, 7), group_size=3, head_dim=head_dim, block_size=block_size, window=125)
        for head_dim in (80, 96, 128, 256)
        for block_size in (16, 32)
    ),
]
PREFILLS = [
    Shape((1, 7, 33, 64), (1, 7, 33, 64), num_kv_heads=1, group_size=4, head_dim=64),
    Shape((16, 32), (48, 64), group_size=1, head_dim=128, block_size=32),
    Shape((20, 45, 129), (20, 111, 129), num_kv_heads=1, group_size=4, head_dim=40, window=10),
]
CASES = [pytest.param(run_decode, shape, id=f"decode-{shape}") for shape in DECODES] + [
    pytest.param(run_prefill, shape, id=f"prefill-{shape}") for shape in PREFILLS
]


@pytest.fixture
def device(triton_device: torch.device) -> torch.device:
    if triton_device.type != "cpu":
        pytest.skip("which of the formats a GPU has is its own affair")
    return triton_device


@pytest.mark.parametrize(("attend", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_equals_float64(attend: Attend, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    problem = make_problem(shape, dtype, device).as_codes(FP8)
    result = check(attend, problem).double()
    expected = attend(problem.to(torch.float64), backend="reference")
    assert (result - expected).norm() <= 5e-3 * expected.norm()


@pytest.mark.parametrize(("backend", "codes"), [("triton", FP8), ("reference", FP8), ("reference", FP8_OF_AMD)])
@pytest.mark.parametrize("head_dim", [64, 36])
def test_what_is_written_can_be_read(backend: str, codes: torch.dtype, head_dim: int, device: torch.device) -> None:
    """Vectors of every size, zeros and such as are not finite; no other slot is touched."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 8, 2, head_dim, generator=generator) * 10.0 ** torch.arange(-4, 4)[:, None, None]
    tokens = tokens.bfloat16()
    tokens[0, 2] = 0.0
    tokens[0, 3, 0, 5], tokens[1, 4, 1, 0] = float("inf"), float("nan")
    slots = torch.tensor([17, 95, 3, 40, 41, 42, 80, 64])
    blocks, offsets = slots // 16, slots % 16
    caches = torch.full((2, 6, 2, 16, head_dim), 99, dtype=torch.int8).view(codes)
    scales = torch.full((2, 6, 2, 16), -1.0, dtype=torch.bfloat16)
    kv_write(tokens[0], tokens[1], caches[0], caches[1], slots, scales[0], scales[1], backend=backend)  # type: ignore[arg-type]
    for token, cache, scale in zip(tokens, caches, scales, strict=True):
        expected_codes, expected_scales = quantize(token, codes)
        finite = token.isfinite().all(-1)
        written = cache.view(torch.int8)[blocks, :, offsets]
        assert torch.equal(written[finite], expected_codes.view(torch.int8)[finite])
        torch.testing.assert_close(scale[blocks, :, offsets], expected_scales, rtol=0, atol=0, equal_nan=True)
        read = read_slots(cache, scale, blocks, offsets, torch.float64)
        assert not read[~finite].isfinite().all(-1).any()
        error, smallest = (read - token.double()).abs()[finite], torch.finfo(codes).tiny / 8
        bound = token.double().abs()[finite] / 16 + 0.51 * smallest * expected_scales.double()[finite][..., None]
        assert (error <= bound).all()
        others = torch.ones(6, 16, dtype=torch.bool)
        others[blocks, offsets] = False
        assert (cache.view(torch.int8).transpose(1, 2)[others] == 99).all()
        assert (scale.transpose(1, 2)[others] == -1.0).all()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("quotients.to(codes.dtype.element_ty)", "(quotients * 1.1).to(codes.dtype.element_ty)"),
        ("k_scales + scale, mask", "v_scales + scale, mask"),
        ("+ 0xFFFF) & -0x10000", "+ 0) & -0x10000"),
    ],
)
def test_faults_of_writing_are_caught(old: str, new: str, device: torch.device, tmp_path: Path) -> None:
    tokens = torch.randn(2, 4, 2, 24, generator=torch.Generator().manual_seed(0))
    slots = torch.tensor([17, 31, 3, 40])

    def is_right(run: Callable[..., None]) -> bool:
        caches = torch.zeros(2, 3, 2, 16, 24, dtype=FP8)
        scales = torch.zeros(2, 3, 2, 16, dtype=torch.bfloat16)
        run(tokens[0], tokens[1], caches[0], caches[1], slots, scales[0], scales[1])
        codes, expected = quantize(tokens, FP8)
        read = caches.view(torch.int8)[:, slots // 16, :, slots % 16]
        return torch.equal(read.transpose(0, 1), codes.view(torch.int8)) and torch.equal(
            scales[:, slots // 16, :, slots % 16].transpose(0, 1), expected
        )

    assert is_right(triton_interpreter.load_variant("kv_write", tmp_path, []).kv_write)
    assert not is_right(triton_interpreter.load_variant("kv_write", tmp_path, [(old, new)]).kv_write)


def test_cpus_have_no_kernels_for_them() -> None:
    problem = make_problem(DECODES[0], torch.bfloat16, torch.device("cpu")).as_codes(FP8)
    with pytest.raises(ValueError, match="fp8 pages are for GPUs; use int8 ones on a CPU"):
        run_decode(problem, backend="cpu")


def test_which_gpus_have_which_format() -> None:
    assert [target.fp8 for target in (A100, H100, B200, MI300)] == [None, FP8, FP8, FP8_OF_AMD]
    assert all(LARGEST_CODE[codes] == torch.finfo(codes).max for codes in (FP8, FP8_OF_AMD))


def cast_kernel(source: tl.tensor, codes: tl.tensor, back: tl.tensor, N: tl.constexpr) -> None:
    index = tl.arange(0, N)
    tl.store(codes + index, tl.load(source + index).to(codes.dtype.element_ty))
    tl.store(back + index, tl.load(codes + index).to(tl.bfloat16))


def test_the_interpreter_casts_as_a_gpu_does(device: torch.device) -> None:
    """To nearest, ties to even, too large ones to the largest; back again without loss."""
    numbers = torch.from_numpy(np.random.default_rng(0).uniform(-300, 300, 1024).astype(np.float32))
    numbers[:3] = torch.tensor([1e6, 17.0, 19.0])  # 17 and 19 lie in the middle of codes
    out, back = torch.zeros(1024, dtype=FP8), torch.zeros(1024, dtype=torch.bfloat16)
    triton_interpreter.jit(cast_kernel)[(1,)](numbers, out, back, N=1024)
    assert torch.equal(out.view(torch.int8), numbers.clamp(-448, 448).to(FP8).view(torch.int8))
    assert torch.equal(back, out.bfloat16())
    assert back[:3].tolist() == [448.0, 16.0, 20.0]
