"""Runs Gluon kernels for Hopper on a CPU: their very source, with a language that computes in numpy.

Triton has no interpreter for Gluon. This one knows what the kernels of the project use. Partitions take turns in an
order drawn at random, at every operation that others can notice, and copies of the TMA arrive at any time. What would
be a race on a GPU is an error here, whatever the order:

- who is told of a copy's arrival by nobody, or waits for ever: `Deadlock`;
- reading what no copy or store has been ordered before, writing what a matrix product may still read, using a product's
  result before waiting for it or giving its registers up, a barrier that the TMA may not know of, or at which more
  arrive than it counts, or other bytes than it expects: `Race`.

Shared memory holds NaN until something is written, and again from the moment at which a copy is asked for. Where
elements lie in it is what Triton says of the layout. Layouts of registers, barriers among the warps of one partition,
and registers themselves are the compiler's: test_kernels_compile.py looks at what it makes of them.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from gluon_machine import Barrier, Memory, Pending, Program, Race, View, current, offsets, set_current
from gluon_tensor import INTEGERS, TYPES, Tensor, tensor_of
from triton.experimental.gluon import language as real


class Kernel:
    """What @gluon.jit and @triton.jit make of a function: called by others, or launched over a grid."""

    seed = 0

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            order = random.Random(self.seed)
            programs = list(itertools.product(*map(range, grid)))
            order.shuffle(programs)
            for ids in programs:
                set_current(Program(ids, grid, order))
                self.function(*map(argument_of, arguments), **constants)

        return launch


def argument_of(value: Any) -> Any:
    """As a kernel sees an argument: tensors as pointers, Python's numbers as scalars."""
    if isinstance(value, torch.Tensor):
        whole = value.as_strided((value.untyped_storage().nbytes() // value.element_size(),), (1,), 0)
        pointer = tl.pointer_type(TYPES[value.dtype])
        return Tensor(np.int64(value.storage_offset()), pointer, base=whole)  # type: ignore[arg-type]
    return value if isinstance(value, TensorDescriptor) else tensor_of(value)


@dataclass
class TensorDescriptor:
    """As Triton's, of a torch tensor."""

    base: torch.Tensor
    whole_shape: Sequence[int]
    strides: Sequence[int]
    block_shape: Sequence[int]
    layout: Any

    def __post_init__(self) -> None:
        self.dtype = TYPES[self.base.dtype]
        self.block_type = SimpleNamespace(nbytes=int(np.prod(self.block_shape)) * self.base.element_size())
        num_bytes = self.base.element_size()
        if any(stride * num_bytes % 16 for stride in self.strides[:-1]) or self.strides[-1] != 1:
            raise ValueError(f"the TMA cannot walk with strides {self.strides}")

    def box(self, corner: Sequence[int]) -> np.ndarray:
        """What lies there; zeros where nothing does."""
        found = np.zeros(self.block_shape, np.float32)
        tensor = self.base.as_strided(tuple(self.whole_shape), tuple(self.strides))
        bounds = list(zip(corner, self.block_shape, self.whole_shape, strict=True))
        source = tuple(slice(max(start, 0), max(min(start + size, end), 0)) for start, size, end in bounds)
        part = tensor[source].float().numpy()
        if part.size:
            begin = [max(-start, 0) for start in corner]
            found[tuple(slice(b, b + n) for b, n in zip(begin, part.shape, strict=True))] = part
        return found


def load(pointer: Tensor, mask: Any = None, other: Any = None) -> Tensor:
    kept = np.ones(pointer.shape, bool) if mask is None else np.broadcast_to(tensor_of(mask).data, pointer.shape)
    base: Any = pointer.base
    at = np.where(kept, pointer.data, 0)
    if (at < 0).any() or (at >= len(base)).any():
        raise IndexError("a load outside its tensor")
    values = base[torch.from_numpy(np.atleast_1d(at))].reshape(pointer.shape)
    dtype = pointer.dtype.element_ty
    data = values.numpy().astype(np.int64) if dtype in INTEGERS else values.float().numpy()
    return Tensor(np.where(kept, data, 0 if other is None else other), dtype)


def store(pointer: Tensor, value: Tensor, mask: Tensor) -> None:
    if value.dtype != pointer.dtype.element_ty:
        raise TypeError(f"{value.dtype} is stored as {pointer.dtype.element_ty}")
    base: Any = pointer.base
    kept = np.broadcast_to(mask.data, pointer.shape)
    base[torch.from_numpy(pointer.data[kept])] = torch.from_numpy(value.data[kept]).to(base.dtype)


def allocate_shared_memory(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
    if dtype == tl.int64:
        return SimpleNamespace(index=[Barrier() for _ in range(shape[0])].__getitem__)
    at = offsets(tuple(shape), layout)
    counters = (np.zeros(at.size, int) for _ in range(2))
    memory = Memory(np.full(at.size, np.nan, np.float32), *counters, np.zeros(at.size, bool))
    return View(memory, at, dtype, layout)


def copy_to_shared(desc: TensorDescriptor, corner: Sequence[Any], barrier: Barrier, target: View) -> None:
    at, memory = target.at, target.memory
    if tuple(desc.block_shape) != target.shape or desc.layout != target.layout:
        raise TypeError(f"a box {desc.block_shape} goes into {target.shape}")
    if (memory.readers[at] > 0).any() or (memory.arriving[at] > 0).any():
        raise Race("a copy meets a matrix product or another copy")
    if not barrier.is_fenced:
        raise Race("a copy is to arrive at a barrier that the TMA may not know yet")
    memory.data[at] = np.nan
    memory.arriving[at] += 1
    values = desc.box([int(place) for place in corner])

    def arrive() -> None:
        memory.data[at] = values
        memory.arriving[at] -= 1
        barrier.receive(desc.block_type.nbytes)

    current().program.copies.append(arrive)
    current().pause()


def initialize(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.missing = count
    current().initialized.append(barrier)


def wait(barrier: Barrier, phase: Any) -> None:
    """Until a phase of that parity has been completed; before the first that is parity 1."""
    current().pause(lambda: barrier.phase & 1 != int(phase))


def arrive(barrier: Barrier, count: int) -> None:
    barrier.arrive(count)
    current().pause()


def expect(barrier: Barrier, num_bytes: int) -> None:
    barrier.arrive(1, int(num_bytes))
    current().pause()


def fence_async_shared() -> None:
    for view in current().stored:
        view.memory.unfenced[view.at] = False
    for barrier in getattr(current(), "initialized", ()):
        barrier.is_fenced = True
    current().stored.clear()


def warpgroup_mma(a: Any, b: View, acc: Any, *, use_acc: bool = True, is_async: bool) -> Pending:
    if not is_async:
        raise NotImplementedError("products that are not asynchronous")
    operands = [operand for operand in (a, b) if isinstance(operand, View)]
    registers = None if isinstance(a, View) else a
    left = a.operand() if isinstance(a, View) else a.data
    if a.dtype != b.dtype or isinstance(acc, Pending):
        raise TypeError(f"a product of {a.dtype} and {b.dtype} is added to {acc}")
    product = left @ b.operand()
    pending = Pending(Tensor(acc.data + product if use_acc else product, tl.float32), operands, registers)
    current().products.append(pending)
    current().pause()
    return pending


def warpgroup_mma_wait(num_outstanding: int, deps: Sequence[Any]) -> Any:
    products = current().products
    while len(products) > num_outstanding:
        done = products.pop(0)
        done.is_done = True
        if done.registers is not None and not any(value is done.registers for value in deps):
            raise Race("a product may still read registers that are free for others")
        for view in done.operands:
            view.memory.readers[view.at] -= 1
    for value in deps:
        if isinstance(value, Pending) and not value.is_done:
            raise Race("the product that is waited for may still be under way")
    results = tuple(value.result if isinstance(value, Pending) else value for value in deps)
    return results[0] if len(results) == 1 else results


def warp_specialize(functions: Sequence[Any], num_warps: Sequence[int], num_registers: Sequence[int]) -> None:
    if not len(functions) - 1 == len(num_warps) == len(num_registers):
        raise ValueError("each partition but the first has a number of warps and of registers")
    current().run(functions)


def where(condition: Any, yes: Any, no: Any) -> Tensor:
    yes = tensor_of(yes)
    other = no.data if isinstance(no, Tensor) else np.asarray(no, yes.data.dtype)
    return Tensor(np.where(tensor_of(condition).data, yes.data, other), yes.dtype, yes.base)


def exp2(value: Tensor) -> Tensor:
    with np.errstate(invalid="ignore"):
        return Tensor(np.exp2(value.data.astype(np.float32)), tl.float32)


def _jit(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return Kernel if function is None else Kernel(function)


gl = SimpleNamespace(
    **{name: getattr(real, name) for name in ("int32", "int64", "float32")},
    **{
        name: getattr(real, name)
        for name in ("NVMMADistributedLayout", "NVMMASharedLayout", "DotOperandLayout", "BlockedLayout", "SliceLayout")
    },
    constexpr=lambda value: value,
    static_range=range,
    program_id=lambda axis: Tensor(current_program().ids[axis], tl.int32),
    num_programs=lambda axis: Tensor(current_program().grid[axis], tl.int32),
    arange=lambda start, end, layout=None: Tensor(np.arange(start, end), tl.int32),
    zeros=lambda shape, dtype, layout: Tensor(np.zeros(shape, np.float32), dtype),
    full=lambda shape, value, dtype, layout: Tensor(np.full(shape, value, np.float32), dtype),
    convert_layout=lambda value, layout: Tensor(value.data, value.dtype, layout=layout),
    minimum=lambda a, b: tensor_of(a).combined(b, np.minimum),
    maximum=lambda a, b: tensor_of(a).combined(b, np.maximum),
    cdiv=lambda number, divisor: (tensor_of(number) + (divisor - 1)) // divisor,
    where=where,
    exp2=exp2,
    max=lambda value, axis: Tensor(value.data.max(axis), value.dtype),
    sum=lambda value, axis: Tensor(value.data.sum(axis, dtype=np.float32), value.dtype),
    load=load,
    store=store,
    allocate_shared_memory=allocate_shared_memory,
    warp_specialize=warp_specialize,
)
mbarrier = SimpleNamespace(init=initialize, wait=wait, arrive=arrive, expect=expect, MBarrierLayout=lambda: None)
tma = SimpleNamespace(async_copy_global_to_shared=copy_to_shared)
gluon = triton = SimpleNamespace(jit=_jit)


def current_program() -> Any:
    return getattr(current(), "program", current())


IMPORTS = (
    ("import triton\nimport triton.language as tl\n", "from gluon_interpreter import gl as tl, triton\n"),
    ("from triton.experimental import gluon\n", "from gluon_interpreter import gluon\n"),
    ("from triton.experimental.gluon import language as gl\n", "from gluon_interpreter import gl\n"),
    ("from triton.experimental.gluon.language.nvidia.hopper import", "from gluon_interpreter import"),
    ("from triton.experimental.gluon.nvidia.hopper import", "from gluon_interpreter import"),
)
PARTS = ("triton_tiles", "gluon_ring", "gluon_tiles", "gluon")


def load_prefill(directory: Path, replacements: Sequence[tuple[str, str]] = ()) -> ModuleType:
    """kernels/paged_prefill/gluon.py and what it is made of, interpreted, with pieces of the source replaced; each
    piece must be there."""
    folder = Path(importlib.util.find_spec("quire.kernels.paged_prefill").origin).parent  # type: ignore[union-attr, arg-type]
    unused, module = set(replacements), None
    for part in PARTS:
        source = (folder / f"{part}.py").read_text()
        for old, new in (*IMPORTS, *replacements):
            if old in source:
                unused.discard((old, new))
                source = source.replace(old, new)
        source = re.sub(
            rf"from quire\.kernels\.paged_prefill\.({'|'.join(PARTS)}) import", r"from \1_variant import", source
        )
        path = directory / f"{part}_variant.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    if unused:
        raise ValueError(f"not in the source: {unused}")
    return module  # type: ignore[return-value]
