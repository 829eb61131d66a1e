"""Compiles kernels for GPUs that are not here and prints what each needs; run as a process of its own.

    python compile_kernels.py PART PARTS     prints one JSON line per kernel of every PARTS-th case, from PART on

A case calls the launcher with tensors that have no data ("meta") and records what it would have launched, so what is
compiled is what a GPU would run: the same specialisation of arguments, tiles, warps and stages.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from quire.kernels.cascade_decode import PrefixGroups
from quire.kernels.paged_prefill.parameters import GLUON_LAUNCH, gluon_parameters, prefill_parameters
from quire.kernels.quantization import LARGEST_CODE
from quire.kernels.targets import A100, B200, H100, MI300, Target

TYPE_NAMES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e4m3fnuz: "*fp8e4b8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
TARGETS = (A100, H100, B200, MI300)
PRODUCT_UNDER_WAY = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1 .*?WARPGROUP\.DEPBAR\.LE gsb0, 0x0 ", re.DOTALL)
"""Machine code between two waits for wgmma: the older product is done, the other one is not."""
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs. `spills` are bytes of stack on NVIDIA, spilled registers on AMD."""

    case: str
    kernel: str
    arch: str
    registers: int
    spills: int
    shared_memory: int
    shared_memory_limit: int
    num_warps: int
    mma: dict[str, int]
    """Matrix instructions, and loads and stores of NVIDIA's that say how data moves, by name."""
    int64_offsets: bool


@dataclass(frozen=True)
class Launch:
    kernel: Any
    args: dict[str, Any]


def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(op: str, target: Target, *args: Any, launcher: str | None = None) -> list[Launch]:
    """What the launcher of `op`, named like it if not otherwise, would launch on `target`."""
    module = importlib.import_module(f"quire.kernels.{op}.triton")
    recorded: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def record(*values: Any, **named: Any) -> None:
                recorded.append(Launch(self.kernel, dict(zip(self.kernel.arg_names, values, strict=False)) | named))

            return record

    with ExitStack() as stack:
        for name, part in list(sys.modules.items()):
            if name.startswith("quire.kernels.") and part is not None:
                for member, value in list(vars(part).items()):
                    if isinstance(value, JITFunction) and member.endswith("_kernel"):
                        stack.enter_context(mock.patch.object(part, member, Recorder(value)))
        if hasattr(module, "current_target"):
            stack.enter_context(mock.patch.object(module, "current_target", return_value=target))
        getattr(module, launcher or op)(*args)
    return recorded


def compile_launch(launch: Launch, target: Target) -> Any:
    """As Triton's own launch would specialise it: 1 is a constant, multiples of 16 are known to be so."""
    names = launch.kernel.arg_names
    constexpr_names = {names[index] for index in launch.kernel.constexprs}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.args[parameter.name]
        is_general = parameter.do_not_specialize
        is_one = isinstance(value, int) and value == 1 and not is_general
        if name in constexpr_names or value is None or is_one:
            signature[name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPE_NAMES[value.dtype]
            is_general = parameter.do_not_specialize_on_alignment
        elif isinstance(value, TensorDescriptor):
            kind = TYPE_NAMES[value.base.dtype].removeprefix("*")
            signature[name] = f"tensordesc<{kind}{value.block_shape},{value.layout!r}>"
            is_general = True
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            is_general = is_general or value % 16 != 0
        else:
            signature[name] = "fp32"
            is_general = True
        if signature[name] != "constexpr" and not is_general:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source_type = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = source_type(launch.kernel, signature, constants, attributes)
    options = {name: launch.args[name] for name in ("num_warps", "num_stages", "maxnreg") if name in launch.args}
    return triton.compile(source, target=GPUTarget(target.vendor, target.arch, target.warp_size), options=options)


def nvidia_resources(compiled: Any) -> tuple[int, int, dict[str, int]]:
    """(registers, bytes of stack, matrix instructions): whatever ptxas spills lies on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        cuobjdump = str(NVIDIA_TOOLS / "cuobjdump")
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([cuobjdump, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resources: {usage}")
    names = ("HMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "FADD", "LDGSTS", "LDG.E.128", "STG.E.128")
    names += ("UTMALDG", "USETMAXREG")
    mma = {name: len(re.findall(rf"\b{name}", sass)) for name in names}
    mma["EX2 beside HGMMA"] = sum(section.count("MUFU.EX2") for section in PRODUCT_UNDER_WAY.findall(sass))
    return int(found[1]), int(found[2]), mma


def amd_resources(compiled: Any) -> tuple[int, int, dict[str, int]]:
    """(vector registers, spilled registers and private bytes, matrix instructions)."""
    assembly = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"no {name} in the assembly")
        return int(found[1])

    spills = field("vgpr_spill_count") + field("sgpr_spill_count") + field("private_segment_fixed_size")
    return field("vgpr_count"), spills, {"MFMA": len(re.findall(r"\bv_mfma", assembly))}


_found: dict[str, tuple[int, int, dict[str, int]]] = {}


def found_resources(compiled: Any, target: Target) -> tuple[int, int, dict[str, int]]:
    """Several cases come to the same kernel, whose machine code need not be read twice."""
    if compiled.hash not in _found:
        _found[compiled.hash] = nvidia_resources(compiled) if target.vendor == "cuda" else amd_resources(compiled)
    return _found[compiled.hash]


def resources(case: str, launch: Launch, target: Target) -> Resources:
    compiled = compile_launch(launch, target)
    registers, spills, mma = found_resources(compiled, target)
    pointer_steps = re.findall(r"tt\.addptr .*", compiled.asm["ttgir" if launch.kernel.is_gluon() else "ttir"])
    return Resources(
        case=case,
        kernel=launch.kernel.__name__,
        arch=f"sm_{target.arch}" if target.vendor == "cuda" else str(target.arch),
        registers=registers,
        spills=spills,
        shared_memory=compiled.metadata.shared,
        shared_memory_limit=target.shared_memory,
        num_warps=compiled.metadata.num_warps,
        mma={name: count for name, count in mma.items() if count},
        int64_offsets=any("i64" in step for step in pointer_steps),
    )


NUM_HEADS, NUM_KV_HEADS, PAGE, CONTEXT = 32, 8, 16, 4096


def caches(dtype: torch.dtype, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1024, NUM_KV_HEADS, PAGE, head_dim)
    return tensor(*shape, dtype=dtype), tensor(*shape, dtype=dtype)


def pages_of(dtype: torch.dtype, head_dim: int) -> tuple[torch.Tensor, ...]:
    """Two caches, and their scales if they hold codes."""
    scales = (tensor(1024, NUM_KV_HEADS, PAGE, dtype=torch.bfloat16) for _ in range(2))
    return (*caches(dtype, head_dim), *scales) if dtype in LARGEST_CODE else caches(dtype, head_dim)


def decode(
    dtype: torch.dtype,
    head_dim: int,
    num_seqs: int,
    window: int | None,
    target: Target,
    codes: torch.dtype | None = None,
) -> list[Launch]:
    query = tensor(num_seqs, NUM_HEADS, head_dim, dtype=dtype)
    tables = tensor(num_seqs, CONTEXT // PAGE, dtype=torch.int32)
    lens = tensor(num_seqs, dtype=torch.int32)
    pages = pages_of(codes or dtype, head_dim)
    return launches("paged_decode", target, query, *pages[:2], tables, lens, 0.1, window, None, *pages[2:])


def cascade(
    dtype: torch.dtype, head_dim: int, num_seqs: int, target: Target, codes: torch.dtype | None = None
) -> list[Launch]:
    query = tensor(num_seqs, NUM_HEADS, head_dim, dtype=dtype)
    tables = tensor(num_seqs, CONTEXT // PAGE, dtype=torch.int32)
    lens, rows, row_lens = (tensor(num_seqs, dtype=torch.int32) for _ in range(3))
    groups = PrefixGroups(rows, tensor(5, dtype=torch.int32), tensor(4, dtype=torch.int32), row_lens)
    pages = pages_of(codes or dtype, head_dim)
    return launches("cascade_decode", target, query, *pages[:2], tables, lens, groups, 0.1, None, *pages[2:])


def prefill(
    dtype: torch.dtype,
    head_dim: int,
    num_seqs: int,
    query_len: int,
    window: int | None,
    target: Target,
    codes: torch.dtype | None = None,
) -> list[Launch]:
    query = tensor(num_seqs * query_len, NUM_HEADS, head_dim, dtype=dtype)
    tables = tensor(num_seqs, CONTEXT // PAGE, dtype=torch.int32)
    lens = tensor(num_seqs, dtype=torch.int32)
    starts = tensor(num_seqs + 1, dtype=torch.int32)
    pages = pages_of(codes or dtype, head_dim)
    arguments = (query, *pages[:2], tables, lens, starts, 0.1, query_len, window, None, *pages[2:])
    return launches("paged_prefill", target, *arguments)


def gluon_prefill(dtype: torch.dtype, head_dim: int, block_size: int) -> list[Launch]:
    """As reasoned, for Hopper; a table of its own may ask for other tiles."""
    importlib.import_module("quire.kernels.paged_prefill.gluon")
    num_seqs, query_len = 8, 1024
    query = tensor(num_seqs * query_len, NUM_HEADS, head_dim, dtype=dtype)
    k_cache, v_cache = (tensor(1024, NUM_KV_HEADS, block_size, head_dim, dtype=dtype) for _ in range(2))
    tables = tensor(num_seqs, CONTEXT // block_size, dtype=torch.int32)
    lens, starts = tensor(num_seqs, dtype=torch.int32), tensor(num_seqs + 1, dtype=torch.int32)
    reasoned = prefill_parameters(dtype, head_dim, NUM_HEADS // NUM_KV_HEADS, query_len, H100)
    parameters = gluon_parameters(reasoned, *GLUON_LAUNCH[head_dim])
    arguments = (query, k_cache, v_cache, tables, lens, starts, 0.1, None, torch.empty_like(query), None, None)
    return launches("paged_prefill", H100, *arguments, parameters, launcher="launch")


def small_operations(dtype: torch.dtype, head_dim: int, target: Target) -> list[Launch]:
    """Norms, rotation and write of a layer with a fused qkv projection."""
    num_tokens, hidden_size = 64, NUM_HEADS * head_dim
    hidden = tensor(num_tokens, hidden_size, dtype=dtype)
    qkv = tensor(num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, head_dim, dtype=dtype)
    query, key, value = qkv.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    positions = tensor(num_tokens, dtype=torch.int64)
    cos_sin = tensor(CONTEXT, head_dim, dtype=torch.float32)
    norms = [tensor(head_dim, dtype=dtype) if dtype == torch.bfloat16 else None for _ in range(2)]
    written = (query, key, value, positions, cos_sin, *caches(dtype, head_dim))
    kinds = [torch.int8] if target.fp8 is None else [torch.int8, target.fp8]
    coded = [pages_of(codes, head_dim) for codes in kinds]
    return [
        *launches("rms_norm", target, hidden, tensor(hidden_size, dtype=dtype), 1e-6),
        *launches(
            "rms_norm", target, hidden, tensor(hidden_size, dtype=dtype), 1e-6, tensor(*hidden.shape, dtype=dtype)
        ),
        *launches("rms_norm", target, query, tensor(head_dim, dtype=dtype), 1e-6),
        *launches("gated_activation", target, hidden, "silu"),
        *launches("rope", target, query, key, positions, cos_sin),
        *launches("kv_write", target, key, value, *caches(dtype, head_dim), positions),
        *launches("rope_kv_write", target, *written, positions, *norms, 1e-6),
        *(launch for p in coded for launch in launches("kv_write", target, key, value, *p[:2], positions, *p[2:])),
    ]


def fp8_layers(dtype: torch.dtype, target: Target) -> list[Launch]:
    """Decode and prefill of layers with weights in `dtype`, the fp8 that the target multiplies."""
    depth, bf16 = 4096, torch.bfloat16
    found = [
        launch
        for size in (depth, 28_672)
        for launch in launches("fp8_linear", target, tensor(8, size, dtype=bf16), dtype, launcher="quantize_tokens")
    ]
    for num_tokens, num_features in ((1, depth), (1, 28_672), (4096, depth)):
        codes, weight = tensor(num_tokens, depth, dtype=dtype), tensor(num_features, depth, dtype=dtype)
        scales, weight_scales = (tensor(number, dtype=torch.float32) for number in (num_tokens, num_features))
        arguments = (codes, scales, weight, weight_scales, tensor(num_features, dtype=bf16), bf16)
        found += launches("fp8_linear", target, *arguments, launcher="scaled_product")
    return found


def sampling(vocab_size: int, target: Target) -> list[Launch]:
    """What follows the last layer: float32, whatever the model's dtype."""
    num_rows = 64
    logits = tensor(num_rows, vocab_size, dtype=torch.float32)
    temperature, top_p, min_p = (tensor(num_rows, dtype=torch.float32) for _ in range(3))
    integers, uniform = tensor(num_rows, dtype=torch.int64), tensor(num_rows, dtype=torch.float64)
    bitmask = tensor(num_rows, -(-vocab_size // 32), dtype=torch.int32)
    return [
        *launches("sample", target, logits, temperature, integers, top_p, min_p, uniform),
        *(launches("argmax", target, logits[:1]) if vocab_size == 151_936 else []),
        *launches("token_bitmask", target, logits, bitmask, integers),
        *(launch for num_top in (0, 1, 64) for launch in launches("log_probs", target, logits, integers, num_top)),
    ]


def cases() -> Iterator[tuple[str, Target, list[Launch]]]:
    """(name, target, launches): the main configurations on every target, the rarer ones where they are tightest."""
    bf16, fp16 = torch.bfloat16, torch.float16
    for target in TARGETS:
        for dtype, head_dim in [(bf16, 128), (bf16, 64), (fp16, 128)]:
            kind = f"{TYPE_NAMES[dtype][1:]}-d{head_dim}"
            yield f"decode-{kind}", target, decode(dtype, head_dim, 8, None, target)
            yield f"prefill-{kind}", target, prefill(dtype, head_dim, 8, 1024, None, target)
            yield f"layer-{kind}", target, small_operations(dtype, head_dim, target)
        for codes in [torch.int8] if target.fp8 is None else [torch.int8, target.fp8]:
            kind = "int8" if codes == torch.int8 else "fp8"
            yield f"decode-bf16-d128-{kind}", target, decode(bf16, 128, 8, None, target, codes)
            yield f"prefill-bf16-d128-{kind}", target, prefill(bf16, 128, 8, 1024, None, target, codes)
            yield f"pieces-bf16-d128-{kind}", target, prefill(bf16, 128, 1, 512, None, target, codes)
        yield "prefill-bf16-d64-int8", target, prefill(bf16, 64, 8, 1024, None, target, torch.int8)
        yield "decode-bf16-d128-window-1seq", target, decode(bf16, 128, 1, 1024, target)
        yield "decode-bf16-d128-256seqs", target, decode(bf16, 128, 256, None, target)
        yield "decode-bf16-d256", target, decode(bf16, 256, 8, None, target)
        yield "prefill-bf16-d128-window", target, prefill(bf16, 128, 8, 1024, 1024, target)
        yield "prefill-bf16-d128-short", target, prefill(bf16, 128, 100, 16, None, target)
        yield "prefill-bf16-d256", target, prefill(bf16, 256, 8, 1024, None, target)
        for dtype, head_dim in [(bf16, 128), (fp16, 64)]:
            kind = f"{TYPE_NAMES[dtype][1:]}-d{head_dim}"
            yield f"pieces-{kind}", target, prefill(dtype, head_dim, 1, 512, None, target)
            yield f"cascade-{kind}", target, cascade(dtype, head_dim, 256, target)
        yield "cascade-bf16-d128-int8", target, cascade(bf16, 128, 256, target, torch.int8)
        yield "pieces-bf16-d128-window", target, prefill(bf16, 128, 1, 512, 1024, target)
        yield "pieces-bf16-d128-short", target, prefill(bf16, 128, 8, 16, None, target)
        yield "pieces-bf16-d256", target, prefill(bf16, 256, 1, 256, None, target)
        yield "cascade-bf16-d128-8seqs", target, cascade(bf16, 128, 8, target)
        yield "cascade-bf16-d256", target, cascade(bf16, 256, 256, target)
        if target.fp8 is not None:
            yield "fp8", target, fp8_layers(target.fp8, target)
        yield "prefill-bf16-d128-int8-window", target, prefill(bf16, 128, 8, 1024, 1024, target, torch.int8)
        for vocab_size in (151_936, 32_003):
            yield f"sampling-fp32-v{vocab_size}", target, sampling(vocab_size, target)
        yield "decode-bf16-d80", target, decode(bf16, 80, 8, None, target)
        yield "decode-bf16-d256-int8-window", target, decode(bf16, 256, 8, 1024, target, torch.int8)
    yield "prefill-bf16-d80", H100, prefill(bf16, 80, 8, 1024, None, H100)
    for dtype, head_dim, block_size in ((bf16, 128, 16), (fp16, 64, 64), (bf16, 256, 32)):
        yield f"gluon-d{head_dim}", H100, gluon_prefill(dtype, head_dim, block_size)


def main() -> None:
    part, num_parts = int(sys.argv[1]), int(sys.argv[2])
    all_launches = [(name, target, launch) for name, target, group in cases() for launch in group]
    for name, target, launch in all_launches[part::num_parts]:
        print(json.dumps(asdict(resources(name, launch, target))), flush=True)


if __name__ == "__main__":
    main()
