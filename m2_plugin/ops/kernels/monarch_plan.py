"""How sequences of a length are transformed by Monarch FFTs: sizes, and the tables for them.

Dimension key as in `monarch_conv`.
"""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from m2_plugin.ops.kernels.launch import (
    cdiv,
    device_class,
    dot_precision,
    major_capability,
    next_power_of_2,
)

TURNS = tl.constexpr(3)  # see `Config`


@dataclass(frozen=True)
class Config:
    """The two factors of a transform, the number of warps, and how many twiddles are stored.

    If `split` is not 1, these are the even ones of the first 2 · N2 / `split` columns. A program
    computes the others from them: each is a stored one times one or more of three turns, which
    depend on its row alone. It takes a few more instructions, and asks the L2 cache for less, which
    limits large transforms. `registers` is the most that a thread gets.
    """

    n1: int
    n2: int
    num_warps: int
    split: int = 1  # 1, 2, 4 or 8
    registers: int | None = None

    @property
    def points(self) -> int:
        """M, the points of one transform."""
        return self.n1 * self.n2

    @property
    def row_warps(self) -> int:
        """The warps that share the rows of a tile (N1, N2); each takes 16."""
        return min(self.num_warps, self.n1 // 16)


# By what is done, device class and bytes per element: transforms that spill no registers
# (`tests/ops/aot.py`), each with the longest sequence that it is for (None: no limit). A transform
# of 2L points or more needs no residue classes, and the first half of its rows holds the sequence.
CONFIGS = {
    ("convolve", "large", 2): (
        (512, Config(n1=64, n2=16, num_warps=4)),
        (1024, Config(n1=64, n2=32, num_warps=4)),
        (2048, Config(n1=64, n2=64, num_warps=4, split=2, registers=168)),  # for three programs
        (4096, Config(n1=128, n2=64, num_warps=8, split=4)),
        (None, Config(n1=64, n2=64, num_warps=4, split=4)),
    ),
    ("convolve", "small", 2): (
        (512, Config(n1=32, n2=32, num_warps=4)),
        (None, Config(n1=64, n2=32, num_warps=4)),
    ),
    ("correlate", "large", 2): (
        (512, Config(n1=64, n2=16, num_warps=4)),
        (2048, Config(n1=64, n2=32, num_warps=4)),
        (None, Config(n1=64, n2=32, num_warps=4, split=2)),
    ),
    ("correlate", "small", 2): ((None, Config(n1=32, n2=32, num_warps=4)),),
    ("convolve", "large", 4): ((None, Config(n1=32, n2=16, num_warps=4)),),
    ("convolve", "small", 4): ((None, Config(n1=32, n2=16, num_warps=4)),),
    ("correlate", "large", 4): ((None, Config(n1=16, n2=16, num_warps=4)),),
    ("correlate", "small", 4): ((None, Config(n1=16, n2=16, num_warps=4)),),
}
# The largest transform, by device class and bytes per element. It takes all registers of a
# multiprocessor and spills up to 24 numbers of a thread, once in a launch. But sequences of these
# lengths need no residue classes then, which would pass through memory.
LARGEST = {("large", 2): Config(n1=128, n2=128, num_warps=8, split=8)}
LARGEST_FOR = range(4097, 8193)


@dataclass(frozen=True)
class Tables:
    """What the kernels read beside their inputs; N1, N2 and R are a configuration's.

    They live as long as the process: a CUDA graph that was captured goes on reading them.
    """

    f1: Tensor  # (R, 3, N1, ROWS): real, imaginary, negated imaginary part
    f2: Tensor  # (3, N2, N2)
    twiddle: Tensor  # (R, 2·N1·(N2 / split + TURNS)), fp32: twiddles, then turns
    fold: Tensor  # (2C, 2S): what folds a pair of rows, padded with zeros for `tl.dot`
    unfold: Tensor  # (2S, 2C): its adjoint, twice for classes that stand for two


@dataclass(frozen=True)
class Plan:
    """How sequences of a length are transformed, and the tables for it."""

    config: Config
    residues: int
    classes: int
    segments: int
    rows: int
    twiddle_vector: int
    registers: int | None
    dtype: torch.dtype
    tables: Tables

    @property
    def folded(self) -> bool:
        """Whether a sequence is longer than one transform."""
        return self.segments > 1

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time arguments of the kernels."""
        return {
            "HALF": self.dtype != torch.float32,
            "PRECISION": dot_precision(self.dtype),
            "SPLIT": self.config.split,
            "TWIDDLES": self.twiddle_vector,
            "WARPS": self.config.row_warps,
            "N1": self.config.n1,
            "N2": self.config.n2,
            "num_warps": self.config.num_warps,
            "num_stages": 1,
            "maxnreg": self.registers,
        }

    @property
    def order_constants(self) -> dict[str, Any]:
        """The compile-time arguments of the kernels that read or write the order of `order`."""
        return {
            "VECTOR": self.vector,
            "WARPS": self.config.row_warps,
            "N1": self.config.n1,
            "N2": self.config.n2,
        }

    @property
    def operand(self) -> torch.dtype:
        """What is multiplied: bfloat16 is too coarse for four products in a row."""
        return torch.float32 if self.dtype == torch.float32 else torch.float16

    @property
    def vector(self) -> int:
        """Operands in 16 bytes."""
        return 16 // self.operand.itemsize

    @property
    def points(self) -> int:
        """N, the circular length."""
        return self.residues * self.config.points

    @property
    def guard(self) -> float:
        """By what a filter's spectrum is multiplied, so that no intermediate result overflows.

        Rows are at most 2 in size, √8 · S if folded: so are the mean squares of the M numbers
        between two products, and M · √M times as much bounds each of them.
        """
        if self.operand == torch.float32:
            return 1.0
        points = self.config.points
        bound = math.sqrt(8) * self.segments * points * math.sqrt(points)
        return 2.0 ** min(0, math.floor(math.log2(65504 / bound)))


def has_largest(x: Tensor) -> bool:
    """Return whether there is a plan with the largest transform for sequences x (B, L, D)."""
    return x.shape[1] in LARGEST_FOR and (device_class(x.device), x.element_size()) in LARGEST


def config_for(what: str, x: Tensor) -> Config:
    """Return the usual configuration for sequences x (B, L, D)."""
    configs = CONFIGS[what, device_class(x.device), x.element_size()]
    return next(c for longest, c in configs if longest is None or x.shape[1] <= longest)


def plan_for(what: str, x: Tensor, largest: bool = False) -> Plan:
    """Return the plan for sequences x (B, L, D); if `largest`, with that transform if there is one.

    Args:
        what: `convolve` or `correlate`.
        x: (B, L, D).
        largest: Whether to take the transform of `LARGEST`, which must hold 2L − 1 points.
    """
    batch_size, length, _ = x.shape
    special = LARGEST.get((device_class(x.device), x.element_size())) if largest else None
    config = special or config_for(what, x)
    residues = cdiv(2 * length - 1, config.points)
    segments = cdiv(length, config.points)
    whole = residues == 1
    classes = residues // 2 + 1 if batch_size == 1 and not whole else residues
    rows = max(config.n1 // 2, 16) if whole else config.n1
    operand = torch.float32 if x.dtype == torch.float32 else torch.float16
    # Triton lets a thread load 16 bytes, or as many numbers as of a spectrum of the same size.
    vector = 16 // operand.itemsize if what == "convolve" and config.split == 1 else 4
    # Loads of other lengths are narrower, and take more registers; so does Triton on a B200.
    limited = config.registers and length % 16 == 0 and major_capability(x.device) == 9
    registers = config.registers if limited else None
    tables = _tables(config, residues, classes, segments, rows, vector, operand, x.device)
    return Plan(config, residues, classes, segments, rows, vector, registers, x.dtype, tables)


@functools.cache
def _tables(*shape_and_device: Any) -> Tables:
    """Return the tables; they are made once, outside of any CUDA graph and its memory pool.

    Args:
        *shape_and_device: As of `_new_tables`; the device is the last.

    Raises:
        RuntimeError: while a CUDA graph is captured, if the tables are not there yet.
    """
    device = shape_and_device[-1]
    if device.type != "cuda":
        return _new_tables(*shape_and_device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the tables of an FFT cannot be made while a CUDA graph is captured: "
            "run the model once on this shape before"
        )

    def make() -> Tables:
        tables = _new_tables(*shape_and_device)
        torch.cuda.synchronize(device)  # other streams will read them
        return tables

    # torch.compile's CUDA graphs warm up in a memory pool of their own, which is that of a thread
    # and its stream. What is allocated in it would be overwritten.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def _new_tables(
    config: Config,
    residues: int,
    classes: int,
    segments: int,
    rows: int,
    twiddle_vector: int,
    operand: torch.dtype,
    device: torch.device,
) -> Tables:
    n1, n2 = config.n1, config.n2

    def ramp(n: int) -> Tensor:
        return torch.arange(n, dtype=torch.float64, device="cpu")

    def turn(angle: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(2 * math.pi * angle), -torch.sin(2 * math.pi * angle)

    def matrix(angle: Tensor, dim: int) -> Tensor:
        cos, sin = turn(angle)
        return torch.stack([cos, sin, -sin], dim).to(device, operand)

    shifted = ramp(n1) + ramp(classes)[:, None] / residues  # k1 + r/R
    phases = torch.stack(turn(ramp(classes)[:, None] * ramp(segments) / residues), -1)
    # Class r also stands for class R − r, if that is not computed and not r itself.
    r = torch.arange(classes)
    missing = (residues - r) % residues >= classes
    doubled = phases * (1 + missing.double())[:, None, None]
    stored = n2 // config.split
    columns = ramp(stored) * (1 if config.split == 1 else 2)
    twiddle = torch.stack(turn(shifted[..., None] * columns / config.points), 1)
    if config.split == 1:
        twiddle = order(twiddle, config, twiddle_vector)
    else:
        twiddle = order_even(twiddle, config)
    # From an even column to the next, and to columns after those that are stored.
    steps = torch.tensor([1.0, 2 * stored, 4 * stored], dtype=torch.float64)[:, None]
    turns = torch.stack(turn(shifted[:, None] * steps / config.points), 2)
    return Tables(
        f1=matrix(shifted[..., None] * ramp(rows) / n1, 1),
        f2=matrix(ramp(n2)[:, None] * ramp(n2) / n2, 0),
        twiddle=torch.cat([twiddle.flatten(1), turns.flatten(1)], 1).to(device, torch.float32),
        fold=_pairs_matrix(phases).to(device, operand),
        unfold=_pairs_matrix(doubled).T.to(device, operand).contiguous(),
    )


def _pairs_matrix(phases: Tensor) -> Tensor:
    """Return what folds pairs of rows by phases (C, S, 2), as a matrix for `tl.dot`.

    Columns are (segment, row of the pair), rows (class, real and imaginary part).
    """
    cos, sin = phases.unbind(-1)
    parts = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1)
    matrix = parts.flatten(2).flatten(0, 1)
    pads = [max(16, next_power_of_2(size)) - size for size in matrix.shape]
    return torch.nn.functional.pad(matrix, (0, pads[1], 0, pads[0]))


def order(table: Tensor, config: Config, vector: int) -> Tensor:
    """Order tables (…, N1, N2) as the matrix unit's registers hold a product.

    A thread then loads with 16 bytes at a time what it multiplies, and nothing moves between
    threads. Each warp has 16 rows: a thread has two of them, 8 apart, and 2 neighbours of each 8
    columns. `vector` numbers of a thread stand side by side. Any order is right if all who read and
    write a table agree; on other hardware, it only costs time.
    """
    warps = config.row_warps
    x = table.unflatten(-1, (-1, vector // 4, 4, 2)).unflatten(-5, (-1, warps, 2, 8))
    # From repetition, warp, half, row, octets, octet, pair, odd.
    x = x.movedim((-4, -7, -5, -2, -3, -6), (-7, -6, -5, -4, -3, -2))
    return x.flatten(-8).contiguous()


def order_even(table: Tensor, config: Config) -> Tensor:
    """Order the even columns (…, N1, columns) of a table, as `order` does for all columns.

    A thread has one of each 4 even columns in two rows. The numbers of both rows in two such
    columns stand side by side.
    """
    x = table.unflatten(-1, (-1, 2, 4)).unflatten(-4, (-1, config.row_warps, 2, 8))
    # From repetition, warp, half, row, pair of octets, octet, lane.
    x = x.movedim((-3, -6, -4, -1, -2, -5), (-6, -5, -4, -3, -2, -1))
    return x.flatten(-7).contiguous()
