"""Executes PTX on a CPU: what a kernel computes as it was compiled, and whether it keeps its order.

Triton's interpreter runs a kernel's source. What the compiler makes of it, with layouts, shared
memory, asynchronous copies and matrix units, runs on a GPU only, or here. The threads of a block
are the lanes of NumPy arrays. Checked are

- global memory: each access is aligned, and within a tensor;
- shared memory: what is read was written, and a barrier lies between if another warp wrote it;
- asynchronous copies and products: they are waited for before anybody needs their results or
  overwrites their inputs. They take effect as late as the program allows;
- barriers, and instructions of a whole warp: all threads come to the same one.

The instructions are those of this package's kernels for sm_80 and sm_90. Approximations of the
hardware, like that of 2^x, are exact here. What ptxas makes of the PTX is not seen.
"""

import itertools
import re
from bisect import bisect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.benchmarks.ptx import Instruction, parse, split

SHARED_BASE = 1024  # where a block's own shared memory begins
MOST_INSTRUCTIONS = 5_000_000  # of a block: a loop without an end is an error

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATING = {16: np.float16, 32: np.float32, 64: np.float64}
LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4  # how lanes hold the fragments of matrices

Mask = np.ndarray | None  # of active threads; None: all
Run = Callable[[Mask], int | None]  # an instruction; returns where a jump goes


class PtxError(Exception):
    """The program does what it must not, or what this module does not know."""


class Program:
    """A parsed kernel."""

    def __init__(self, text: str):
        params, blocks, self.types = parse(text)
        self.num_params = len(params)
        self.code = [instruction for block in blocks for instruction in block.body]
        starts = itertools.accumulate((len(block.body) for block in blocks), initial=0)
        places = zip(blocks, starts, strict=False)
        self.labels = {label: start for block, start in places for label in block.labels}


class GlobalMemory:
    """The memory of tensors, at its own addresses.

    Args:
        regions: The address of each storage, and its bytes.
    """

    def __init__(self, regions: Sequence[tuple[int, np.ndarray]]):
        self.regions = sorted(regions, key=lambda region: region[0])
        self.bases = [base for base, _ in self.regions]

    def locate(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes of a tensor, and (threads, size) indices into them."""
        if (addresses % np.uint64(size)).any():
            raise PtxError(f"an address that {size} does not divide")
        found = bisect(self.bases, int(addresses[0])) - 1
        base, data = self.regions[max(found, 0)]
        at = (addresses - np.uint64(base)).astype(np.int64)
        if (at < 0).any() or (at + size > len(data)).any():
            worst = at[np.argmax(np.maximum(-at, at + size - len(data)))]
            raise PtxError(f"{size} bytes at offset {worst} of a tensor of {len(data)} bytes")
        return data, at[:, None] + np.arange(size)


class SharedMemory:
    """The shared memory of a block, and who used it since the last barrier."""

    def __init__(self, size: int):
        self.size = size
        self.data = np.full(size, 0xFF, np.uint8)
        self.written = np.zeros(size, bool)
        self.writer = np.full(size, -1, np.int16)  # the warp
        self.readers = np.zeros(size, np.uint32)  # a bit for each warp
        self.copied = np.zeros(size, np.int16)  # copies under way to here
        self.multiplied = np.zeros(size, np.int16)  # products under way of what is here

    def index(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Return (threads, size) indices."""
        at = addresses.astype(np.int64) - SHARED_BASE
        if (at < 0).any() or (at + size > self.size).any():
            raise PtxError(f"shared bytes {at.min()} to {at.max() + size} of {self.size}")
        if (at % size).any():
            raise PtxError(f"a shared address that {size} does not divide")
        return at[:, None] + np.arange(size)

    def read(self, at: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """Return bytes that warps read."""
        self._check(at, warps, reads=True)
        if not self.written[at].all():
            raise PtxError("reads what was never written")
        np.bitwise_or.at(self.readers, at, _bit(warps)[:, None])
        return self.data[at]

    def write(self, at: np.ndarray, value: np.ndarray, warps: np.ndarray) -> None:
        """Write bytes, now."""
        self._check(at, warps)
        self.arrive(at, value, warps)

    def arrive(self, at: np.ndarray, value: np.ndarray, warps: np.ndarray) -> None:
        """Write bytes without a check."""
        self.data[at] = value
        self.written[at] = True
        self.writer[at] = np.broadcast_to(warps[:, None], at.shape)

    def begin_copy(self, at: np.ndarray, warps: np.ndarray) -> None:
        """Note that bytes will arrive some time."""
        self._check(at, warps)
        np.add.at(self.copied, at, 1)
        self.data[at] = 0xFF

    def begin_product(self, at: np.ndarray) -> None:
        """Note that the matrix unit reads bytes some time."""
        if not self.written[at].all() or self.copied[at].any() or (self.writer[at] >= 0).any():
            raise PtxError("multiplies what is not there yet")
        np.add.at(self.multiplied, at, 1)

    def end_product(self, at: np.ndarray, warps: Sequence[int]) -> None:
        """Note that it has read them, for some warps."""
        np.subtract.at(self.multiplied, at, 1)
        for warp in warps:
            np.bitwise_or.at(self.readers, at, np.uint32(1 << warp))

    def barrier(self) -> None:
        """Order all that came before."""
        self.writer[:] = -1
        self.readers[:] = 0

    def _check(self, at: np.ndarray, warps: np.ndarray, reads: bool = False) -> None:
        writer = self.writer[at]
        if ((writer >= 0) & (writer != warps[:, None])).any():
            raise PtxError("no barrier after another warp's write")
        if self.copied[at].any():
            raise PtxError("does not wait for a copy")
        if reads:
            return
        if (self.readers[at] & ~_bit(warps)[:, None]).any():
            raise PtxError("no barrier after another warp's read")
        if self.multiplied[at].any():
            raise PtxError("does not wait for a product of what it overwrites")


def _bit(warps: np.ndarray) -> np.ndarray:
    return np.uint32(1) << warps.astype(np.uint32)


# --- arithmetic -----------------------------------------------------------------------------------


def _shift_left(x: np.ndarray, n: np.ndarray) -> np.ndarray:
    bits = x.itemsize * 8
    return np.where(n >= bits, x.dtype.type(0), x << np.minimum(n, bits - 1).astype(x.dtype))


def _shift_right(x: np.ndarray, n: np.ndarray) -> np.ndarray:
    bits = x.itemsize * 8
    shifted = x >> np.minimum(n, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(n >= bits, x.dtype.type(0), shifted)


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if x.dtype.kind == "f":
        return x / y
    return np.trunc(x.astype(np.float64) / y).astype(x.dtype)


def _fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    if x.dtype == np.float32:
        return (x.astype(np.float64) * y + z).astype(np.float32)
    return x * y + z


def _bits(x: np.ndarray, first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Extract bits, with the sign of the highest if x is signed."""
    size = x.itemsize * 8
    wide, first, count = (v.astype(np.int64) for v in (x, first, count))
    found = (wide >> first) & ((1 << count) - 1)
    if x.dtype.kind == "i":
        sign = (wide >> np.minimum(first + count - 1, size - 1)) & 1
        found = np.where((sign == 1) & (count > 0), found | -(1 << count), found)
    return found.astype(x.dtype)


ELEMENTWISE: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "neg": lambda x: -x,
    "abs": np.abs,
    "not": lambda x: ~x,
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y,
    "div": _divide,
    "rem": np.fmod,
    "fma": _fma,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcp": lambda x: 1 / x,
    "ex2": np.exp2,
    "lg2": np.log2,
}
COMPARISONS: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
ROUNDINGS = {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}


def dtype_of(name: str) -> Any:
    """Return NumPy's type for one of PTX, `b32`, `s64`, `f16`, `pred`; bfloat16 as its bits."""
    if name == "pred":
        return np.bool_
    kinds = {"b": UNSIGNED, "u": UNSIGNED, "s": SIGNED, "f": FLOATING}
    return np.uint16 if name == "bf16" else kinds[name[0]][int(name[1:])]


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round fp32 to the bits of bfloat16."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def to_float32(bits: np.ndarray, kind: str) -> np.ndarray:
    """Return numbers of a matrix unit's operand, of `f16`, `bf16` or `tf32`, from their bits."""
    bits = np.ascontiguousarray(bits)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind == "bf16":
        return (bits.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "tf32":
        return (bits.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    raise PtxError(f"products of {kind}")


class Machine:
    """Runs the blocks of a launch, one after the other.

    Args:
        program: What it runs.
        memory: The tensors' memory.
        arguments: The kernel's arguments, in the order of the program's parameters.
        grid: The grid's size, three numbers.
        threads: Number of threads of a block, a multiple of 32.
        shared: Bytes of shared memory of a block.
    """

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        arguments: Sequence[int | float],
        grid: Sequence[int],
        threads: int,
        shared: int,
    ):
        self.program, self.memory, self.threads = program, memory, threads
        self.arguments = arguments
        self.warps = np.arange(threads) // 32
        self.special = {"%tid.x": np.arange(threads, dtype=np.uint32)}
        for axis, size in zip("xyz", grid, strict=True):
            self.special[f"%ctaid.{axis}"] = np.zeros(threads, np.uint32)  # of the running block
            self.special[f"%nctaid.{axis}"] = np.full(threads, size, np.uint32)
        self.bytes = shared
        self.registers: dict[str, np.ndarray] = {}
        self._reset()
        self.steps = [self._decode(instruction) for instruction in program.code]
        self.together = [".sync" in instruction.op for instruction in program.code]

    def _reset(self) -> None:
        self.registers.clear()
        self.shared = SharedMemory(self.bytes)
        self.copies: list[list[Callable[[], None]]] = [[]]  # groups; the last is open
        self.products: list[list[Callable[[], None]]] = [[]]
        self.at = 0  # the next instruction
        self.places: np.ndarray | None = None  # the threads' own, while they differ; −1: ended

    def run(self, block: Sequence[int]) -> None:
        """Run all threads of the block at this place of the grid to their ends."""
        self._reset()
        for axis, place in zip("xyz", block, strict=True):
            self.special[f"%ctaid.{axis}"][:] = place
        with np.errstate(all="ignore"):
            for _ in range(MOST_INSTRUCTIONS):
                if not self._step():
                    return
        raise PtxError("does not end")

    def _step(self) -> bool:
        """Run the next instruction, of all threads or of those that are furthest behind."""
        active: Mask = None
        if self.places is not None:
            waiting = np.unique(self.places[self.places >= 0])
            if not len(waiting):
                return False
            ready = [p for p in waiting if len(waiting) == 1 or not self.together[p]]
            if not ready:
                raise PtxError("threads wait for each other at different places")
            self.at = int(ready[0])
            active = self.places == self.at
            if active.all():
                active, self.places = None, None
        guard, run = self.steps[self.at]
        mask = active
        if guard is not None:
            mask = guard() if active is None else guard() & active
            if mask.all():
                mask = None
        jump = None
        if mask is None or mask.any():
            try:
                jump = run(mask)
            except PtxError as error:
                text = f"{error}, in instruction {self.at}: {self.program.code[self.at]}"
                raise PtxError(text) from None
        return self._go_on(jump, mask, active)

    def _go_on(self, jump: int | None, mask: Mask, active: Mask) -> bool:
        if self.places is None and (jump is None or mask is None):
            self.at = self.at + 1 if jump is None else jump
            return self.at >= 0
        if self.places is None:
            self.places = np.full(self.threads, self.at)
            active = np.ones(self.threads, bool)
        self.places[active] += 1
        if jump is not None:
            self.places[active if mask is None else mask] = jump
        return True

    # --- operands ---------------------------------------------------------------------------------

    def _type(self, register: str) -> str:
        found = self.program.types.get(register)
        found = found or self.program.types.get(re.sub(r"\d+$", "", register))
        if found is None:
            raise PtxError(f"unknown operand {register}")
        return found

    def _reader(self, operand: str, kind: str) -> Callable[[], np.ndarray]:
        dtype = np.dtype(dtype_of(kind))
        constant: Any = None
        if found := re.fullmatch(r"0[fd]([0-9A-Fa-f]+)", operand):
            bits = 4 * len(found[1])
            constant = np.array(int(found[1], 16), UNSIGNED[bits]).view(FLOATING[bits])
            if dtype.kind != "f":
                constant = constant.view(UNSIGNED[bits])
        elif re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", operand):
            number, bits = int(operand.rstrip("U"), 0), 8 * dtype.itemsize
            constant = number != 0
            if dtype.kind != "b":
                constant = np.array(number & ((1 << bits) - 1), UNSIGNED[bits]).view(dtype)
        elif operand == "global_smem":
            constant = SHARED_BASE
        elif operand in self.special:
            special = self.special[operand]
            return lambda: special.copy()
        if constant is not None:
            value = np.broadcast_to(np.asarray(constant).astype(dtype), self.threads).copy()
            return lambda: value
        self._type(operand)

        def read() -> np.ndarray:
            found = self.registers.get(operand)
            if found is None:
                raise PtxError(f"{operand} was never written")
            if found.itemsize > dtype.itemsize:  # the lower part
                found = np.ascontiguousarray(found).view(UNSIGNED[8 * dtype.itemsize])
                found = np.ascontiguousarray(found.reshape(self.threads, -1)[:, 0])
            return found.view(dtype)

        return read

    def _writer(self, register: str) -> Callable[[np.ndarray, Mask], None]:
        if register == "_":
            return lambda value, mask: None
        kind = self._type(register)
        dtype = np.dtype(np.bool_ if kind == "pred" else UNSIGNED[int(kind[1:])])

        def write(value: np.ndarray, mask: Mask) -> None:
            if value.itemsize < dtype.itemsize:
                value = value.view(UNSIGNED[8 * value.itemsize]).astype(dtype)
            value = value.view(dtype)
            if mask is not None:
                value = np.where(mask, value, self.registers.get(register, dtype.type(0)))
            self.registers[register] = value

        return write

    def _address(self, operand: str) -> Callable[[], np.ndarray]:
        base, _, offset = (part.strip() for part in operand[1:-1].partition("+"))
        kind = "u64" if base == "global_smem" else "u" + self._type(base)[1:]
        read, distance = self._reader(base, kind), np.int64(int(offset or "0", 0))
        return lambda: (read().astype(np.int64) + distance).view(np.uint64)

    def _list(self, operand: str) -> list[str]:
        return split(operand.strip("{}"))

    # --- instructions -----------------------------------------------------------------------------

    def _decode(self, instruction: Instruction) -> tuple[Callable[[], np.ndarray] | None, Run]:
        guard = None
        if instruction.guard:
            read = self._reader(instruction.guard, "pred")
            guard = (lambda: ~read()) if instruction.negated else read
        name, *modifiers = instruction.parts
        if name in ELEMENTWISE:
            run = self._elementwise(ELEMENTWISE[name], modifiers[-1], instruction.operands)
        elif hasattr(self, f"_{name}"):
            run = getattr(self, f"_{name}")(modifiers, instruction.operands)
        else:
            raise PtxError(f"unknown instruction {instruction}")
        return guard, run

    def _elementwise(self, function: Callable, kind: str, operands: list[str]) -> Run:
        write = self._writer(operands[0])
        if re.match("b?f16", kind):  # or a pair
            part, whole = kind.removesuffix("x2"), "b32" if kind.endswith("x2") else "b16"
            halves, dtype = [self._reader(x, whole) for x in operands[1:]], dtype_of(whole)

            def run_halves(mask: Mask) -> None:
                found = function(*(to_float32(read(), part) for read in halves))
                found = found.astype(np.float16) if part == "f16" else to_bfloat16(found)
                write(found.view(dtype), mask)

            return run_halves
        pair = kind.endswith("16x2")  # of integers
        part = dtype_of(kind.removesuffix("x2"))
        reads = [self._reader(x, "b32" if pair else kind) for x in operands[1:]]
        if pair:
            both = lambda x: np.ascontiguousarray(x).view(part)  # noqa: E731
            return lambda mask: write(function(*(both(x()) for x in reads)).view(np.uint32), mask)
        return lambda mask: write(function(*(read() for read in reads)), mask)

    def _extreme(self, modifiers: list[str], operands: list[str], of: str) -> Run:
        propagates = modifiers[-1][0] != "f" or "NaN" in modifiers
        function = getattr(np, f"{of}imum" if propagates else f"f{of}")
        return self._elementwise(function, modifiers[-1], operands)

    def _min(self, modifiers: list[str], operands: list[str]) -> Run:
        return self._extreme(modifiers, operands, "min")

    def _max(self, modifiers: list[str], operands: list[str]) -> Run:
        return self._extreme(modifiers, operands, "max")

    def _mul(self, modifiers: list[str], operands: list[str]) -> Run:
        kind = modifiers[-1]
        if modifiers[0] in ("wide", "hi"):
            bits = int(kind[1:])
            wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * bits]

            def product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
                found = x.astype(wide) * y.astype(wide)
                return found if modifiers[0] == "wide" else (found >> wide(bits)).astype(x.dtype)

            return self._elementwise(product, kind, operands)
        return self._elementwise(np.multiply, kind, operands)

    def _mad(self, modifiers: list[str], operands: list[str]) -> Run:
        kind = modifiers[-1]
        if modifiers[0] != "wide":
            return self._elementwise(lambda x, y, z: x * y + z, kind, operands)
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        write, add = self._writer(operands[0]), self._reader(operands[3], wide)
        x, y = (self._reader(name, kind) for name in operands[1:3])
        dtype = dtype_of(wide)
        return lambda mask: write(x().astype(dtype) * y().astype(dtype) + add(), mask)

    def _shift(self, function: Callable, kind: str, operands: list[str]) -> Run:
        write, x = self._writer(operands[0]), self._reader(operands[1], kind)
        n = self._reader(operands[2], "u32")
        return lambda mask: write(function(x(), n()), mask)

    def _shl(self, modifiers: list[str], operands: list[str]) -> Run:
        return self._shift(_shift_left, "u" + modifiers[-1][1:], operands)

    def _shr(self, modifiers: list[str], operands: list[str]) -> Run:
        return self._shift(_shift_right, modifiers[-1].replace("b", "u"), operands)

    def _shf(self, modifiers: list[str], operands: list[str]) -> Run:
        write = self._writer(operands[0])
        low, high, n = (self._reader(name, "u32") for name in operands[1:])

        def run(mask: Mask) -> None:
            by = n() & np.uint32(31) if "wrap" in modifiers else np.minimum(n(), np.uint32(32))
            both = (high().astype(np.uint64) << np.uint64(32)) | low()
            left = (both << by.astype(np.uint64)) >> np.uint64(32)
            found = left if "l" in modifiers else both >> by.astype(np.uint64)
            write(found.astype(np.uint32), mask)

        return run

    def _bfe(self, modifiers: list[str], operands: list[str]) -> Run:
        write, x = self._writer(operands[0]), self._reader(operands[1], modifiers[-1])
        first, count = (self._reader(name, "u32") for name in operands[2:])
        return lambda mask: write(_bits(x(), first(), count()), mask)

    def _prmt(self, modifiers: list[str], operands: list[str]) -> Run:
        write = self._writer(operands[0])
        x, y, selector = (self._reader(name, "b32") for name in operands[1:])

        def run(mask: Mask) -> None:
            source = np.stack([x(), y()], 1).view(np.uint8)
            which = (selector()[:, None] >> (4 * np.arange(4, dtype=np.uint32))) & np.uint32(15)
            found = np.take_along_axis(source, (which & np.uint32(7)).astype(int), 1)
            sign = np.where(found & 0x80, 0xFF, 0).astype(np.uint8)
            found = np.where(which & np.uint32(8), sign, found)
            write(np.ascontiguousarray(found).view(np.uint32)[:, 0], mask)

        return run

    def _mov(self, modifiers: list[str], operands: list[str]) -> Run:
        to, source = operands
        kind = modifiers[-1]
        if to[0] == "{":
            writes = [self._writer(name) for name in self._list(to)]
            read, part = self._reader(source, kind), UNSIGNED[int(kind[1:]) // len(writes)]

            def split(mask: Mask) -> None:
                parts = np.ascontiguousarray(read()).view(part).reshape(self.threads, -1)
                for i, write in enumerate(writes):
                    write(np.ascontiguousarray(parts[:, i]), mask)

            return split
        if source[0] == "{":
            names, write = self._list(source), self._writer(to)
            reads = [self._reader(name, f"b{int(kind[1:]) // len(names)}") for name in names]
            whole = UNSIGNED[int(kind[1:])]
            return lambda mask: write(np.stack([r() for r in reads], 1).view(whole)[:, 0], mask)
        return self._elementwise(lambda x: x, kind, operands)

    def _selp(self, modifiers: list[str], operands: list[str]) -> Run:
        write, which = self._writer(operands[0]), self._reader(operands[3], "pred")
        x, y = (self._reader(name, modifiers[-1]) for name in operands[1:3])
        return lambda mask: write(np.where(which(), x(), y()), mask)

    def _setp(self, modifiers: list[str], operands: list[str]) -> Run:
        how, kind = modifiers[0], modifiers[-1].replace("b", "u")
        write = self._writer(operands[0])
        x, y = (self._reader(name, kind) for name in operands[1:3])

        def compare() -> np.ndarray:
            left, right = x(), y()
            unordered = np.isnan(left) | np.isnan(right) if kind[0] == "f" else False
            if how in ("num", "nan"):
                return ~unordered if how == "num" else unordered
            found = COMPARISONS[how[:2]](left, right)
            return found | unordered if len(how) > 2 else found & ~np.asarray(unordered)

        if modifiers[1] not in ("and", "or", "xor"):
            return lambda mask: write(compare(), mask)
        other, combine = self._reader(operands[3], "pred"), ELEMENTWISE[modifiers[1]]
        return lambda mask: write(combine(compare(), other()), mask)

    def _cvt(self, modifiers: list[str], operands: list[str]) -> Run:
        to, source = modifiers[-2:]
        write = self._writer(operands[0])
        if to in ("f16x2", "bf16x2"):
            high, low = (self._reader(name, "f32") for name in operands[1:])

            def pair(mask: Mask) -> None:
                both = np.stack([low(), high()], 1)
                both = both.astype(np.float16) if to == "f16x2" else to_bfloat16(both)
                write(both.view(np.uint32)[:, 0], mask)

            return pair
        if "bf16" in (to, source):
            read = self._reader(operands[1], "f32" if to == "bf16" else "b16")
            change = to_bfloat16 if to == "bf16" else lambda bits: to_float32(bits, "bf16")
            return lambda mask: write(change(read()), mask)
        if to == "tf32":  # to the nearest, halves away from zero
            read = self._reader(operands[1], "b32")
            half, kept = np.uint32(0x1000), np.uint32(0xFFFFE000)
            return lambda mask: write((read() + half) & kept, mask)
        read, dtype = self._reader(operands[1], source), dtype_of(to)
        rounding = next((ROUNDINGS[m] for m in modifiers if m in ROUNDINGS), None)

        def run(mask: Mask) -> None:
            x = read() if rounding is None else rounding(read())
            if source[0] == "f" and to[0] != "f":
                limits = np.iinfo(dtype)
                x = np.clip(np.nan_to_num(x.astype(np.float64)), limits.min, limits.max)
            write(x.astype(dtype), mask)

        return run

    def _bra(self, modifiers: list[str], operands: list[str]) -> Run:
        return lambda mask: self.program.labels[operands[0]]

    def _ret(self, modifiers: list[str], operands: list[str]) -> Run:
        return lambda mask: -1

    def _nothing(self, modifiers: list[str], operands: list[str]) -> Run:
        return lambda mask: None

    _nanosleep = _fence = _nothing

    def _bar(self, modifiers: list[str], operands: list[str]) -> Run:
        return lambda mask: None if modifiers[0] == "warp" else self.shared.barrier()

    # --- memory -----------------------------------------------------------------------------------

    def _ld(self, modifiers: list[str], operands: list[str]) -> Run:
        space, kind = modifiers[0], modifiers[-1]
        if space == "param":
            return self._load_argument(kind, operands)
        names = self._list(operands[0])
        writes, address = [self._writer(name) for name in names], self._address(operands[1])
        dtype = np.dtype(dtype_of(kind))
        size = dtype.itemsize * len(names)

        def run(mask: Mask) -> None:
            which = slice(None) if mask is None else mask
            where = address()[which]
            if space == "global":
                data, at = self.memory.locate(where, size)
                raw = data[at]
            else:
                at = self.shared.index(where, size)
                raw = self.shared.read(at, self.warps[which])
            parts = np.ascontiguousarray(raw).view(dtype)
            for i, write in enumerate(writes):
                value = np.zeros(self.threads, dtype)
                value[which] = parts[:, i]
                write(value, mask)

        return run

    def _load_argument(self, kind: str, operands: list[str]) -> Run:
        write, bits = self._writer(operands[0]), int(kind[1:])
        argument = self.arguments[int(re.search(r"_param_(\d+)", operands[1])[1])]
        if isinstance(argument, float):
            value = np.full(self.threads, argument, FLOATING[bits])
        else:
            value = np.full(self.threads, argument & ((1 << bits) - 1), UNSIGNED[bits])
            if kind[0] == "s":  # its sign fills a wider register
                value = value.view(SIGNED[bits]).astype(SIGNED[int(self._type(operands[0])[1:])])
        return lambda mask: write(value, mask)

    def _st(self, modifiers: list[str], operands: list[str]) -> Run:
        address, bits = self._address(operands[0]), int(modifiers[-1][1:])
        reads = [self._reader(name, f"b{bits}") for name in self._list(operands[1])]
        size = bits // 8 * len(reads)

        def run(mask: Mask) -> None:
            which = slice(None) if mask is None else mask
            where = address()[which]
            value = np.stack([read() for read in reads], 1)[which].view(np.uint8)
            if modifiers[0] == "global":
                data, at = self.memory.locate(where, size)
                data[at] = value
            else:
                self.shared.write(self.shared.index(where, size), value, self.warps[which])

        return run

    def _cp(self, modifiers: list[str], operands: list[str]) -> Run:
        if modifiers[1] == "commit_group":
            return lambda mask: self.copies.append([])
        if modifiers[1] == "wait_group":
            return lambda mask: self._wait(self.copies, int(operands[0], 0))
        to, source = self._address(operands[0]), self._address(operands[1])
        size = int(operands[2], 0)
        used = self._reader(operands[3] if len(operands) > 3 else operands[2], "u32")

        def run(mask: Mask) -> None:
            which = slice(None) if mask is None else mask
            at, count = self.shared.index(to()[which], size), used()[which]
            if ((count != 0) & (count != size)).any():
                raise PtxError("copies a part")
            value, full = np.zeros((len(at), size), np.uint8), count > 0
            if full.any():
                data, origin = self.memory.locate(source()[which][full], size)
                value[full] = data[origin]
            warps = self.warps[which]
            self.shared.begin_copy(at, warps)

            def arrive() -> None:
                np.subtract.at(self.shared.copied, at, 1)
                self.shared.arrive(at, value, warps)

            self.copies[-1].append(arrive)

        return run

    def _wait(self, groups: list[list[Callable[[], None]]], left: int) -> None:
        """End all groups but the last `left` that are closed."""
        while len(groups) - 1 > left:
            for end in groups.pop(0):
                end()

    # --- instructions of a whole warp -------------------------------------------------------------

    def _shfl(self, modifiers: list[str], operands: list[str]) -> Run:
        write, value = self._writer(operands[0]), self._reader(operands[1], "b32")
        by, limits = (self._reader(name, "u32") for name in operands[2:4])
        lane = np.arange(self.threads) % 32

        def run(mask: Mask) -> None:
            offset, limit = by().astype(int) & 31, limits().astype(int)
            segment, clamp = (limit >> 8) & 31, limit & 31
            last = (lane & segment) | (clamp & ~segment)
            if modifiers[1] == "bfly":
                source = lane ^ offset
            elif modifiers[1] == "idx":
                source = (lane & segment) | (offset & ~segment)
            else:
                raise PtxError(f"shfl.{modifiers[1]}")
            source = np.where(source <= last, source, lane)
            write(value()[32 * self.warps + source], mask)

        return run

    def _redux(self, modifiers: list[str], operands: list[str]) -> Run:
        write, value = self._writer(operands[0]), self._reader(operands[1], modifiers[-1])
        reduce = {"max": np.max, "min": np.min, "add": np.sum}[modifiers[1]]

        def run(mask: Mask) -> None:
            found = reduce(value().reshape(-1, 32), 1)
            write(np.repeat(found, 32).astype(dtype_of(modifiers[-1])), mask)

        return run

    def _rows(self, address: Callable[[], np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where the rows of `count` matrices of 8 × 8 are, for each warp, and the warps."""
        where = address().reshape(-1, 32)[:, : 8 * count].reshape(-1)
        return self.shared.index(where, 16), np.repeat(np.arange(self.threads // 32), 8 * count)

    def _ldmatrix(self, modifiers: list[str], operands: list[str]) -> Run:
        writes = [self._writer(name) for name in self._list(operands[0])]
        address = self._address(operands[1])

        def run(mask: Mask) -> None:
            found = self.shared.read(*self._rows(address, len(writes)))
            found = np.ascontiguousarray(found).view(np.uint16).reshape(-1, len(writes), 8, 8)
            if "trans" in modifiers:
                found = found.swapaxes(2, 3)
            found = np.ascontiguousarray(found).reshape(-1, len(writes), 64).view(np.uint32)
            for i, write in enumerate(writes):
                write(np.ascontiguousarray(found[:, i]).reshape(-1), mask)

        return run

    def _stmatrix(self, modifiers: list[str], operands: list[str]) -> Run:
        address = self._address(operands[0])
        reads = [self._reader(name, "b32") for name in self._list(operands[1])]

        def run(mask: Mask) -> None:
            value = np.stack([read().reshape(-1, 32) for read in reads], 1)
            value = value.view(np.uint16).reshape(-1, len(reads), 8, 8)
            if "trans" in modifiers:
                value = value.swapaxes(2, 3)
            at, warps = self._rows(address, len(reads))
            value = np.ascontiguousarray(value).view(np.uint8).reshape(len(at), 16)
            self.shared.write(at, value, warps)

        return run

    def _left(self, registers: Sequence[np.ndarray], kind: str) -> np.ndarray:
        """Return matrices (…, 16, K) from the registers of warps, each (…, 32)."""
        each = 4 // (4 if kind == "tf32" else 2)  # numbers of a register
        depth = 4 * each * len(registers) // 2
        found = np.zeros((*registers[0].shape[:-1], 16, depth), np.float32)
        for i, register in enumerate(registers):
            numbers = to_float32(register, kind).reshape(*register.shape, each)
            for j in range(each):
                column = each * MEMBER + j + 4 * each * (i // 2)
                found[..., GROUP + 8 * (i % 2), column] = numbers[..., j]
        return found

    def _right(self, registers: Sequence[np.ndarray], kind: str) -> np.ndarray:
        """Return matrices (…, K, 8) from the registers of warps, each (…, 32)."""
        each = 4 // (4 if kind == "tf32" else 2)
        found = np.zeros((*registers[0].shape[:-1], 4 * each * len(registers), 8), np.float32)
        for i, register in enumerate(registers):
            numbers = to_float32(register, kind).reshape(*register.shape, each)
            for j in range(each):
                found[..., each * MEMBER + j + 4 * each * i, GROUP] = numbers[..., j]
        return found

    def _mma(self, modifiers: list[str], operands: list[str]) -> Run:
        kind = modifiers[-2]
        writes = [self._writer(name) for name in self._list(operands[0])]
        left, right = ([self._reader(name, "b32") for name in self._list(x)] for x in operands[1:3])
        sums = [self._reader(name, "f32") for name in self._list(operands[3])]

        def run(mask: Mask) -> None:
            a, b = ([read().reshape(-1, 32) for read in reads] for reads in (left, right))
            found = self._left(a, kind).astype(np.float64) @ self._right(b, kind)
            for i, (write, add) in enumerate(zip(writes, sums, strict=True)):
                part = found[:, GROUP + 8 * (i // 2), 2 * MEMBER + i % 2].reshape(-1)
                write((part + add()).astype(np.float32), mask)

        return run

    def _wgmma(self, modifiers: list[str], operands: list[str]) -> Run:
        if modifiers[0] == "fence":
            return lambda mask: None
        if modifiers[0] == "commit_group":
            return lambda mask: self.products.append([])
        if modifiers[0] == "wait_group":
            return lambda mask: self._wait(self.products, int(operands[0], 0))
        return self._asynchronous_product(modifiers, operands)

    def _asynchronous_product(self, modifiers: list[str], operands: list[str]) -> Run:
        """Multiply (64, K) and (K, N) for each group of four warps, some time."""
        size = next(m for m in modifiers if m.startswith("m64"))
        columns, depth = (int(x) for x in re.findall(r"[nk](\d+)", size))
        kind = modifiers[-1]
        names = self._list(operands[0])
        writes = [self._writer(name) for name in names]
        sums = [self._reader(name, "f32") for name in names]
        in_registers = operands[1][0] == "{"
        left = [
            self._reader(name, "b32" if in_registers else "u64") for name in self._list(operands[1])
        ]
        right = self._reader(operands[2], "u64")
        adds, *signs_and_order = operands[3:]
        added = self._reader(adds, "pred")
        sign = int(signs_and_order[0]) * int(signs_and_order[1])
        transposed = [int(x) for x in signs_and_order[2:]] or [0]
        groups = range(self.threads // 128)

        def matrix(at: np.ndarray) -> np.ndarray:
            return to_float32(self.shared.data[at], kind)[..., 0]

        def run(mask: Mask) -> None:
            places, parts = [], []
            for group in groups:
                warps = slice(128 * group, 128 * group + 128)
                used = [self._operand(right()[warps], columns, depth, kind, transposed[-1])]
                a = None
                if in_registers:
                    held = [read()[warps].reshape(4, 32) for read in left]
                    a = self._left(held, kind).reshape(64, -1)
                else:
                    used.append(self._operand(left[0]()[warps], 64, depth, kind, transposed[0]))
                for at in used:
                    self.shared.begin_product(at)
                places.append(used)
                parts.append(a)
            keeps = added()

            def end() -> None:
                found = np.zeros((len(names), self.threads), np.float32)
                for group, used, a in zip(groups, places, parts, strict=True):
                    b, a = matrix(used[0]), matrix(used[1]) if a is None else a
                    product = sign * (a.astype(np.float64) @ b.T)
                    for at in used:
                        self.shared.end_product(at, range(4 * group, 4 * group + 4))
                    product = product.reshape(4, 16, columns)
                    for i in range(len(names)):
                        column = 2 * MEMBER + i % 2 + 8 * (i // 4)
                        part = product[:, GROUP + 8 * (i // 2 % 2), column]
                        found[i, 128 * group : 128 * group + 128] = part.reshape(-1)
                for write, add, part in zip(writes, sums, found, strict=True):
                    write(np.where(keeps, add() + part, part) if keeps.any() else part.copy(), None)

            self.products[-1].append(end)

        return run

    def _operand(
        self, descriptor: np.ndarray, rows: int, depth: int, kind: str, transposed: int
    ) -> np.ndarray:
        """Return where a matrix (rows, depth) is in shared memory, with the bytes of each number.

        A descriptor has, in units of 16 bytes, the first address and two strides; and how wide the
        pattern is in which addresses are permuted. Patterns have 8 lines. Lines run along the depth
        or, if transposed, along the rows.
        """
        if (descriptor != descriptor[0]).any():
            raise PtxError("threads describe different matrices")
        size = 4 if kind == "tf32" else 2
        bits = int(descriptor[0])
        first, leading, stride = (((bits >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
        width = {1: 128, 2: 64, 3: 32}.get(bits >> 62)
        if width is None:
            raise PtxError("a matrix without a permuted pattern")
        row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
        along, line = (row * size, k) if transposed else (k * size, row)
        if not transposed and (depth * size > width):
            raise PtxError("a matrix that is deeper than its pattern")
        at = first + along // width * leading + along % width + line % 8 * width
        at = at + line // 8 * stride
        at ^= ((at >> 7) & (width // 16 - 1)) << 4
        return self.shared.index(at.reshape(-1).astype(np.uint64), size).reshape(rows, depth, size)
