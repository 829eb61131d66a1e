"""Triton's interpreter, with arithmetic that can be trusted and for as long as it is asked for.

Triton decides when a function is decorated whether it is compiled or interpreted, and its interpreter multiplies the
bit patterns of bfloat16 as if they were integers. `interpreted_kernels` sees to the first for the kernels of the
project, `bfloat16_arithmetic` corrects the second; both undo what they did. They reach into private parts of Triton:
test_kernels_interpreter.py and test_kernels_compile.py prove that they do what they say.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

KERNEL_MODULES = (
    "quire.kernels.triton_probability",
    "quire.kernels.triton_shares",
    "quire.kernels.paged_prefill.triton_tiles",
    "quire.kernels.paged_prefill.triton_pieces",
    *(
        f"quire.kernels.{op}.triton"
        for op in (
            *("rms_norm", "rope", "kv_write", "rope_kv_write", "paged_decode", "paged_prefill", "cascade_decode"),
            *("gated_activation", "fp8_linear", "argmax", "sample", "token_bitmask", "log_probs"),
        )
    ),
)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bit patterns, rounded to nearest even as GPUs do."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def widen_float8(bits: np.ndarray) -> np.ndarray:
    """Bit patterns of e4m3 as float32."""
    return torch.from_numpy(np.ascontiguousarray(bits)).view(torch.float8_e4m3fn).float().numpy()


def narrow_float8(values: np.ndarray) -> np.ndarray:
    """float32 as bit patterns of e4m3, rounded to nearest even; too large ones become the largest, as on GPUs."""
    numbers = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).clamp(-448, 448)
    return numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _wide(handle: Any) -> Any:
    if handle.get_element_ty() == tl.float8e4nv:
        return interpreter.TensorHandle(widen_float8(handle.data), tl.float32)
    if handle.get_element_ty() != tl.bfloat16:
        return handle
    return interpreter.TensorHandle(widen(handle.data), tl.float32)


def _narrow(handle: Any) -> Any:
    return interpreter.TensorHandle(narrow(handle.data), tl.bfloat16)


def _is_bfloat16(handle: Any) -> bool:
    return bool(handle.get_element_ty() == tl.bfloat16)


@contextmanager
def bfloat16_arithmetic() -> Iterator[None]:
    """Within it the interpreter's dots, operators and casts compute bfloat16 by way of float32 and round e4m3."""
    builder = interpreter.InterpreterBuilder
    names = ("create_dot", "binary_op", "unary_op", "create_fma", "cast_impl", "create_fp_to_fp")
    original: dict[str, Callable[..., Any]] = {name: getattr(builder, name) for name in names}

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original["create_dot"](self, _wide(a), _wide(b), *rest)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        result = original["binary_op"](self, _wide(lhs), _wide(rhs), op)
        is_comparison = result.data.dtype == np.bool_
        return result if is_comparison or not _is_bfloat16(lhs) else _narrow(result)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        result = original["unary_op"](self, _wide(arg), op)
        return _narrow(result) if _is_bfloat16(arg) else result

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        result = original["create_fma"](self, _wide(x), _wide(y), _wide(z))
        return _narrow(result) if _is_bfloat16(z) else result

    def cast_impl(self: Any, source: Any, target_type: Any) -> Any:
        if target_type.scalar == tl.float8e4nv:
            values = original["cast_impl"](self, _wide(source), tl.float32).data
            return interpreter.TensorHandle(narrow_float8(values), tl.float8e4nv)
        if target_type.scalar != tl.bfloat16:
            return original["cast_impl"](self, _wide(source), target_type)
        return _narrow(original["cast_impl"](self, _wide(source), tl.float32))

    def create_fp_to_fp(self: Any, source: Any, target_type: Any, rounding_mode: Any) -> Any:
        corrected = (tl.bfloat16, tl.float8e4nv)
        if source.get_element_ty() in corrected or target_type.scalar in corrected:
            return cast_impl(self, source, target_type)
        return original["create_fp_to_fp"](self, source, target_type, rounding_mode)

    replacements = (create_dot, binary_op, unary_op, create_fma, cast_impl, create_fp_to_fp)
    for name, replacement in zip(names, replacements, strict=True):
        setattr(builder, name, replacement)
    try:
        yield
    finally:
        for name, function in original.items():
            setattr(builder, name, function)


@contextmanager
def _environment() -> Iterator[None]:
    """Functions that are decorated with triton.jit within it are interpreted."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


@contextmanager
def interpreted_language() -> Iterator[None]:
    """Within it `tl.sum` and its like can be called by interpreted kernels.

    They are jit functions themselves, decorated when triton was imported, perhaps long ago and not to be interpreted.
    Gluon, which the first launch imports, insists on finding them as they were. A call of one jit function by another
    makes the interpreter patch the language for good, so all of it is put back at the end.
    """
    importlib.import_module("triton.experimental.gluon")
    patched = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)
    before = [dict(vars(owner)) for owner in patched]
    for module in (tl, tl.standard):
        for name, member in list(vars(module).items()):
            if isinstance(member, JITFunction):
                setattr(module, name, interpreter.InterpretedFunction(member.fn))
    try:
        yield
    finally:
        interpreter.InterpretedFunction.rewritten_fn.clear()
        for owner, members in zip(patched, before, strict=True):
            for name, member in list(vars(owner).items()):
                if name not in members:
                    delattr(owner, name)
                elif member is not members[name]:
                    setattr(owner, name, members[name])


@contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Within it `backend="triton"` runs interpreted; afterwards the kernels are imported anew by whoever asks."""
    with interpreted_language(), _environment():
        for name in KERNEL_MODULES:
            sys.modules.pop(name, None)
            importlib.import_module(name)
    with interpreted_language():
        yield
    for name in KERNEL_MODULES:
        sys.modules.pop(name, None)


def load_variant(op: str, directory: Path, replacements: Sequence[tuple[str, str]]) -> Any:
    """The kernel module of `op` with pieces of its source replaced, interpreted; each piece must be there.

    For a prefill they may also be in what it attends to a tile with.
    """
    parts, rest = [], list(replacements)
    if op == "paged_prefill":
        name = "quire.kernels.paged_prefill.triton_tiles"
        source = _source(name)
        parts = [load_variant_of(name, directory, [pair for pair in rest if pair[0] in source])]
        rest = [pair for pair in rest if pair[0] not in source]
    return load_variant_of(f"quire.kernels.{op}.triton", directory, rest, parts)


def _source(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(name)
    return Path(spec.origin).read_text()


def load_variant_of(
    name: str, directory: Path, replacements: Sequence[tuple[str, str]], imports: Sequence[Any] = ()
) -> Any:
    """As load_variant, of any module; it imports from variants of others in place of what they are variants of."""
    source = _source(name)
    moved = [(f"from {module.VARIANT_OF} import", f"from {module.__name__} import") for module in imports]
    for old, new in (*replacements, *moved):
        if old not in source:
            raise ValueError(f"{name} has no {old!r}")
        source = source.replace(old, new)
    path = directory / f"{name.replace('.', '_')}_variant.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    module.VARIANT_OF = name  # type: ignore[attr-defined]
    sys.modules[path.stem] = module
    with _environment():
        spec.loader.exec_module(module)
    return module


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` for a kernel that a test defines itself."""
    with _environment():
        return triton.jit(function)


@contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Within it the programs of a launch run in random order, as they may on a GPU."""
    builder = interpreter.InterpreterBuilder
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx
    order: list[tuple[int, ...]] = []

    def shuffle(self: Any, *sizes: int) -> None:
        set_grid_dim(self, *sizes)
        order[:] = itertools.product(*map(range, sizes))
        random.Random(seed).shuffle(order)

    builder.set_grid_dim = shuffle
    builder.set_grid_idx = lambda self, *_: set_grid_idx(self, *order.pop())
    try:
        yield
    finally:
        builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
