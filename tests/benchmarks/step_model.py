"""Predicts, without a GPU, what a step of M2-BERT and of BERT takes on one.

    python tests/benchmarks/step_model.py                       # all; minutes
    python tests/benchmarks/step_model.py --lengths 128 --kernels

The models run on fake tensors under bf16 autocast (`fake_gpu.py`), in the sizes of
`bench_model.py`. Each launch that this records is given a time: PyTorch's own by its bytes and
operations, at rates that were measured on an H200 for ops of its class; a Triton kernel by what
some of its threads execute (`ptx.py`), and what the compiler made of it. So nothing here knows the
kernels by name.

A kernel's time is that of its slowest part: memory (each tensor once a launch), matrix units,
instructions (as many as the warps that a multiprocessor can hold keep going), loads and stores, or
what its threads ask the caches for; and the last wave of programs may leave multiprocessors idle.
Launches follow one another after a gap. Where a GPU would time several configurations, the one of
the shortest predicted time runs.

Everything printed is predicted, and may be wrong by 40%. The host is taken to be ahead of the GPU;
where it is not, a step takes longer. Writes results/step_model.json, in which rows stay that are
not run again. Needs PyTorch 2.7 with CUDA (no GPU), Triton, transformers and a C compiler.
"""

import fake_gpu

if __name__ == "__main__":
    fake_gpu.in_fake_process()

import argparse
import datetime
import functools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ptx
from fake_gpu import Launch, Operand

RESULTS = Path(__file__).parent / "results"
LENGTHS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
TOKENS = 1 << 15
MODELS = ("m2_bert", "bert_sdpa")
SAMPLES = 8  # threads that are followed in a launch
STEPS = 0.618, 0.755, 0.570  # by which their programs lie apart, as parts of the grid


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet: dense bf16 operations and bytes a second, and its processors."""

    name: str
    capability: int
    processors: int
    clock: float
    operations: float
    bandwidth: float
    shared: int
    threads: int = 2048


DEVICES = (
    Device("H200", 90, 132, 1.83e9, 989e12, 4.8e12, 227 << 10),
    Device("H100", 90, 132, 1.75e9, 989e12, 3.35e12, 227 << 10),
    Device("A100", 80, 108, 1.41e9, 312e12, 2.0e12, 163 << 10),
    Device("B200", 100, 148, 1.85e9, 2250e12, 7.7e12, 227 << 10),
)
# All below was measured on an H200, or fitted to what a profile of it showed, at L = 128 to 32,768
# and 32,768 tokens. Rates are shares of the data sheet's, so that they carry over to other devices.
GAP_S = 2.4e-6  # from the end of a kernel to the start of the next
SHORTEST_S = 2.0e-6
COPY = 3.6e12 / 4.8e12  # of one layout and dtype
MIXED = 2.4e12 / 4.8e12  # pointwise, with several dtypes
TRANSPOSED = 0.75e12 / 4.8e12
LAYER_NORM = 2.15e12 / 4.8e12
REDUCTION = 1.35e12 / 4.8e12
PRODUCTS = 700e12 / 989e12  # cuBLAS in bf16, when long enough
PRODUCT_START_S = 5e-6
FP32_PRODUCTS = 30e12 / 989e12
ATTENTION = {"forward": 475e12 / 989e12, "dropout": 181e12 / 989e12, "backward": 335e12 / 989e12}
# Of a kernel of our own.
TENSOR = {"wgmma": 0.75, "tcgen05": 0.7, "mma": 0.8}
OLD_MATRIX_UNIT = 0.6  # what `mma` reaches of the rate of `wgmma`, from sm_90 on
ISSUE = 0.25  # instructions a cycle and scheduler, times the root of its warps
MOST_ISSUE = 0.75
# That a multiprocessor's loads and stores, and products' reads of shared memory, move in a cycle.
WAVE_BYTES = 128
CACHE_BYTES = 27  # that it gets in a cycle from the L2 cache, with what its own cache has


@dataclass
class Cost:
    """Of one launch, or of several."""

    launches: int = 0
    bytes: float = 0
    requested: float = 0  # bytes that its threads ask the caches for; of our kernels alone
    operations: float = 0
    seconds: float = 0
    parts: dict[str, float] = field(default_factory=dict)  # seconds that each would need alone

    @property
    def limit(self) -> str:
        return max(self.parts, key=self.parts.__getitem__, default="")


# --- PyTorch's own ops ---------------------------------------------------------------------------

FIRST_MATRIX = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_addmm_activation": 1}
REDUCTIONS = {"sum", "mean", "amax", "max", "all", "any", "cumsum", "linalg_vector_norm", "nonzero"}
SOFTMAX = {"_log_softmax", "_softmax", "_log_softmax_backward_data", "_softmax_backward_data"}
GATHERS = {"embedding", "index", "index_select", "gather"}  # they read as much as they write
WRITE_ONLY = {"copy_", "zero_", "fill_", "normal_", "uniform_", "random_"}
# Ops that are several kernels.
SEVERAL = {"native_layer_norm_backward": 3, "embedding_dense_backward": 4, "nonzero": 3}
SEVERAL |= {"index_put": 4, "_scaled_dot_product_flash_attention_backward": 3, "_fft_c2c": 3}
SEVERAL |= {"_fft_r2c": 2, "_fft_c2r": 2, "equal": 3}
FOREACH_TENSORS, FOREACH_ELEMENTS = 36, 320 << 16  # of one launch of several tensors


def order(x: Operand) -> tuple[int, ...]:
    """The dimensions of a tensor as they lie in memory, without those of size 1."""
    dims = [i for i in range(len(x.shape)) if x.shape[i] > 1]
    return tuple(sorted(dims, key=lambda i: -x.stride[i]))


def torch_cost(x: Launch, device: Device) -> Cost:
    """Cost of an op of PyTorch."""
    memory = functools.partial(_rate, device.bandwidth)
    unread = 1 if x.name in WRITE_ONLY else len(x.outputs) if x.name == "_foreach_copy_" else 0
    inputs = x.inputs[unread:]
    moved = sum(t.bytes for t in (*inputs, *x.outputs))
    if x.name.startswith("nll_loss"):  # one logit of a row is read; backward, zeros are written
        moved = sum(t.bytes for t in x.outputs)
    if x.name in GATHERS:
        moved = sum(2 * t.bytes for t in x.outputs)
    cost = Cost(SEVERAL.get(x.name, 1), moved)
    large = [t for t in (*inputs, *x.outputs) if t.elements > 1024]
    if (first := FIRST_MATRIX.get(x.name.rstrip("_"))) is not None:
        cost.operations = 2 * x.outputs[0].elements * x.inputs[first].shape[-1]
        # cuBLAS adds a bias along the last dimension. Another is first spread over the output.
        if first and (len(x.inputs[0].shape) > 1 and x.inputs[0].shape != x.outputs[0].shape):
            cost.launches += 1
            cost.bytes += 2 * x.outputs[0].bytes
        half = x.inputs[first].width == 2
        rate = device.operations * (PRODUCTS if half else FP32_PRODUCTS)
        cost.parts = {
            "matrix units": cost.operations / rate + PRODUCT_START_S,
            "memory": cost.bytes / memory(COPY),
        }
        cost.seconds = max(cost.parts.values())
        if cost.launches > 1:
            cost.seconds += 2 * x.outputs[0].bytes / memory(COPY)
        return cost
    if "scaled_dot_product" in x.name:
        q = next(t for t in x.inputs if len(t.shape) == 4)
        cost.operations = 4 * q.elements * q.shape[2]
        kind = "dropout" if any(isinstance(a, float) and a > 0 for a in x.arguments) else "forward"
        if "backward" in x.name:
            kind, cost.operations = "backward", 2.5 * cost.operations
        cost.parts = {
            "matrix units": cost.operations / (device.operations * ATTENTION[kind]),
            "memory": moved / memory(COPY),
        }
        cost.seconds = max(cost.parts.values())
        return cost
    share = COPY
    if x.name.startswith("_foreach"):
        share = MIXED
        tensors = len(x.outputs) or len(x.inputs)
        elements = sum(t.elements for t in x.outputs or x.inputs)
        cost.launches = max(
            math.ceil(tensors / FOREACH_TENSORS), math.ceil(elements / FOREACH_ELEMENTS)
        )
    elif x.name.startswith("native_layer_norm"):
        share = LAYER_NORM
    elif x.name in REDUCTIONS:
        share = REDUCTION
    elif large and len({order(t) for t in large if len(t.shape) == len(large[0].shape)}) > 1:
        share = TRANSPOSED
    elif (
        x.name in SOFTMAX
        or x.name not in ("_to_copy", "copy_")
        and len({t.dtype for t in large}) > 1
    ):
        share = MIXED
    cost.parts = {"memory": moved / memory(share)}
    cost.seconds = max(cost.parts["memory"], SHORTEST_S * cost.launches)
    return cost


def _rate(bandwidth: float, share: float) -> float:
    return bandwidth * share


# --- Triton's kernels ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """A kernel, as far as its cost depends on it alone."""

    program: ptx.Program
    code: ptx.MachineCode
    names: tuple[str, ...]  # of the arguments that are parameters of the machine's code
    pointers: tuple[bool, ...]
    shared: int


_compiled: dict[str, Compiled] = {}
# By kernel: wavefronts for each access to shared memory, and the share that are bank conflicts.
_shared: dict[str, tuple[float, float]] = {}


def compiled(kernel: Any) -> Compiled:
    """Take a kernel apart, once."""
    found = _compiled.get(kernel.hash)
    if found is None:
        signature = {k: v for k, v in kernel.src.signature.items() if v != "constexpr"}
        found = _compiled[kernel.hash] = Compiled(
            ptx.Program(kernel.asm["ptx"]),
            ptx.machine_code(kernel.asm["cubin"]),
            tuple(signature),
            tuple(str(v).startswith("*") for v in signature.values()),
            kernel.metadata.shared,
        )
    return found


def sampled(size: int, i: int, step: float) -> int:
    """The i-th of some numbers below `size` that lie well apart."""
    return int((i * step + 0.37) % 1 * size)


@functools.cache
def _followed(
    key: str, values: tuple[int, ...], grid: tuple[int, int, int]
) -> tuple[dict[int, float], dict[int, float], Counter]:
    """Mean over threads: bytes read and written by argument, and the work."""
    found = _compiled[key]
    read, written, work = Counter(), Counter(), Counter()
    for i in range(SAMPLES):
        place = [sampled(n, i, s) for n, s in zip(grid, STEPS, strict=True)]
        thread = sampled(found.program.threads, i, 0.382)
        counts = found.program.follow(values, thread, place, grid)
        read.update(counts["read"])
        written.update(counts["written"])
        if found.program.asks_for_all and thread:
            first = found.program.follow(values, 0, place, grid)["work"]
            for name in ("operations", "tensor tcgen05"):
                counts["work"][name] = first[name]
        work.update(counts["work"])

    def mean(c: Counter) -> Counter:
        return Counter({k: v / SAMPLES for k, v in c.items()})

    return mean(read), mean(written), mean(work)


def kernel_cost(x: Launch, device: Device) -> tuple[Cost, dict[str, Any]]:
    """Cost of a launch of a Triton kernel, and what it says about the kernel."""
    k = compiled(x.kernel)
    values = []
    for i, (name, pointer) in enumerate(zip(k.names, k.pointers, strict=True)):
        value = x.values[name]
        number = value if isinstance(value, int) else 0
        # Views begin inside of an allocation; only the region of an address matters.
        values.append((i + 1) << ptx.REGION if pointer else number & ((1 << 64) - 1))
    read, written, work = _followed(x.kernel.hash, tuple(values), x.grid)
    programs = math.prod(x.grid)
    threads = programs * k.program.threads
    moved = 0.0
    for found in (read, written):
        for i, amount in found.items():
            size = x.sizes.get(k.names[i], 0) if 0 <= i < len(k.names) else 0
            moved += min(amount * threads, size)
    warps = k.program.threads / 32
    registers = k.code.registers + (-k.code.registers) % 8
    held = min(
        device.threads // k.program.threads,
        65536 // max(1, registers * k.program.threads),
        device.shared // (k.shared + 1024),
        32,
    )
    slots = max(1, held) * device.processors
    # In the last wave, some of the places for programs stay empty.
    use = programs / (math.ceil(programs / slots) * slots)
    busy = min(1.0, use * max(1, held)) if programs < slots else use
    loop_ratio = straight_ratio = 1.0
    if (inside := k.program.instructions(True)) and k.code.looped:
        unrolled = max(1.0, round(k.code.anchors / max(1, k.program.anchors())))
        loop_ratio = k.code.looped / inside / unrolled
    if outside := k.program.instructions(False):
        straight_ratio = k.code.straight / outside
    issued = work["looped"] * loop_ratio + work["straight"] * straight_ratio
    resident = min(max(1, held), max(1.0, programs / device.processors)) * warps / 4
    per_cycle = min(MOST_ISSUE, ISSUE * resident**0.5)
    cycles = issued * warps * programs / (4 * device.processors)
    tensor = 0.0
    for name, share in TENSOR.items():
        if name == "mma" and device.capability >= 90:
            share *= OLD_MATRIX_UNIT
        tensor += work["tensor " + name] * threads / (share * device.operations)
    requested = sum(read.values()) + sum(written.values())
    if x.kernel.hash not in _shared:
        place = [sampled(n, 1, s) for n, s in zip(x.grid, STEPS, strict=True)]
        taken, least = k.program.wavefronts(values, place, x.grid)
        _shared[x.kernel.hash] = taken / max(1, work["shared"]), 1 - least / max(1, taken)
    each, conflicts = _shared[x.kernel.hash]
    waves = max(32 * requested / WAVE_BYTES, work["requests"])
    waves += work["shared"] * each + 32 * work["read by products"] / WAVE_BYTES
    parts = {
        "memory": moved / (COPY * device.bandwidth),
        "matrix units": tensor / busy,
        "instructions": cycles / per_cycle / device.clock / busy,
        "loads and stores": waves * warps * programs / device.processors / device.clock / busy,
        "L2 cache": requested * threads / (CACHE_BYTES * device.processors * device.clock) / busy,
    }
    seconds = max(SHORTEST_S, *parts.values())
    cost = Cost(1, moved, requested * threads, work["operations"] * threads, seconds, parts)
    about = {
        "registers": k.code.registers,
        "spilled_bytes": k.code.spilled,
        "shared_bytes": k.shared,
        "bank_conflicts": conflicts if work["shared"] else 0.0,
        "programs_per_processor": held,
        "warps": int(warps),
        "grid": list(x.grid),
        "matrix_unit": next((n for n in TENSOR if work["tensor " + n]), ""),
        "loop_instructions": k.code.looped,
    }
    return cost, about


# --- Steps ---------------------------------------------------------------------------------------


def cost_of(x: Launch, device: Device) -> tuple[Cost, dict[str, Any]]:
    return kernel_cost(x, device) if x.kernel is not None else (torch_cost(x, device), {})


def tuner(recorder: Any, device: Device) -> Callable[..., Any]:
    """What takes the place of `tuning.best`: the candidate of the shortest predicted time."""
    chosen: dict[tuple[Any, ...], Any] = {}

    def best(
        op: str, key: tuple, candidates: Sequence[Any], run: Callable, *_: Any, **__: Any
    ) -> Any:
        if len(candidates) > 1 and (op, key) not in chosen:
            before, seconds = recorder.launches, []
            for config in candidates:
                for _ in range(2):  # what the first run keeps, the second need not compute
                    recorder.launches = []
                    run(config)
                seconds.append(sum(cost_of(x, device)[0].seconds for x in recorder.launches))
            recorder.launches = before
            chosen[op, key] = candidates[seconds.index(min(seconds))]
        return chosen.get((op, key), candidates[0])

    return best


@functools.cache
def record(name: str, what: str, length: int, device: Device, layers: int | None) -> list[Launch]:
    """The launches of a forward pass or of a training step, as `bench_model.py` times them."""
    import torch
    from bench_model import BASE, SCALES, TRAINED, build

    from m2_plugin.ops.kernels import tuning

    recorder = fake_gpu.recorder(device.capability)
    tuning.best = tuner(recorder, device)
    batch = max(1, TOKENS // length)
    if layers:
        for family in ("m2_bert", "bert"):
            SCALES["base"][family] = BASE | {"num_hidden_layers": layers}
    with fake_gpu.fake_gpu(recorder):
        model = build(name, "base", length, "cuda")
        with torch.device("cuda"):
            ids = torch.randint(1000, 30000, (batch, length))
            given = {"attention_mask": torch.ones_like(ids)}
        autocast = torch.autocast("cuda", torch.bfloat16)
        if what == "forward":
            model.eval()
            for _ in range(2):  # what the first call keeps, the second need not compute
                recorder.launches.clear()
                with torch.no_grad(), autocast, recorder:
                    model.base_model(ids, **given)
            return recorder.launches
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
        with recorder:
            with autocast:
                loss = model(ids, **given, labels=ids, **TRAINED.get(name, {})).loss
            loss.backward()
        optimizer.step()  # the first one allocates moments
        with recorder:
            optimizer.step()
    return recorder.launches


def predict(launches: Iterable[Launch], device: Device) -> dict[str, Any]:
    """Sums over a step, and over the launches of each name."""
    total, by_name = Cost(), defaultdict(Cost)
    about: dict[str, dict[str, Any]] = {}
    counted: list[tuple[Launch, Cost]] = []
    for x in launches:
        cost, facts = cost_of(x, device)
        counted.append((x, cost))
        key = x.name if not facts else f"{x.name} {facts['grid']}"
        for into in (total, by_name[key]):
            into.launches += cost.launches
            into.bytes += cost.bytes
            into.requested += cost.requested
            into.operations += cost.operations
            into.seconds += cost.seconds
            for part, seconds in cost.parts.items():
                into.parts[part] = into.parts.get(part, 0.0) + seconds
        if facts:
            about[key] = facts
    rows = [
        {
            "name": name.split(" ")[0],
            "launches": cost.launches,
            "ms": 1e3 * cost.seconds,
            "bytes": cost.bytes,
            "requested_bytes": cost.requested,
            "operations": cost.operations,
            "limit": cost.limit,
            "parts_ms": {k: 1e3 * v for k, v in cost.parts.items()},
            **about.get(name, {}),
        }
        for name, cost in sorted(by_name.items(), key=lambda item: -item[1].seconds)
    ]
    return {
        "ms": 1e3 * (total.seconds + GAP_S * total.launches),
        "kernels_ms": 1e3 * total.seconds,
        "launches": total.launches,
        "bytes_per_token": total.bytes / TOKENS,
        "requested_bytes": total.requested,
        "operations_per_token": total.operations / TOKENS,
        "rows": rows,
    }


def kept(row: dict[str, Any], whole: bool) -> dict[str, Any]:
    """What is written of a row: launches of at least 1% of the step; elsewhere our kernels only."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return float(f"{value:.4g}") if isinstance(value, float) else value

    found = dict(row)
    for name in MODELS:
        if name in row:
            rows = [r for r in row[name]["rows"] if r["ms"] >= 0.01 * row[name]["ms"]]
            rows = [short(r) for r in rows if whole or "registers" in r]
            found[name] = short(row[name]) | {"rows": rows}
    return found


def show(rows: list[dict[str, Any]], most: int) -> None:
    print(f"  {'predicted':<44}{'n':>5}{'ms':>9}{'GB':>8}{'TFLOP':>8}  limit")
    for row in rows[:most]:
        text = f"  {row['name']:<44}{row['launches']:>5}{row['ms']:>9.3f}"
        text += f"{row['bytes'] / 1e9:>8.2f}{row['operations'] / 1e12:>8.3f}  {row['limit']}"
        if "registers" in row:
            held = f"{row['programs_per_processor']}×{row['warps']} warps"
            text += f", {row['registers']} registers, {held}, {row['matrix_unit'] or 'no products'}"
            text += f", spills {row['spilled_bytes']} B" if row["spilled_bytes"] else ""
            text += f", {row['bank_conflicts']:.0%} conflicts"
        print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--devices", nargs="+", default=[d.name for d in DEVICES])
    parser.add_argument("--what", nargs="+", default=["forward", "step"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--layers", type=int, help="instead of 12, to try this script")
    parser.add_argument("--kernels", type=int, nargs="?", const=25, default=0, help="rows shown")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    import torch
    import triton

    from m2_plugin.ops.backend import failures

    report: dict[str, Any] = {
        "benchmark": "step_model",
        "predicted": True,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "tokens": TOKENS,
        "layers": args.layers or 12,
        "rows": [],
    }
    print("All figures are PREDICTED: nothing here has run on a GPU.")
    for device in (d for d in DEVICES if d.name in args.devices):
        for what in args.what:
            for length in args.lengths:
                row: dict[str, Any] = {"device": device.name, "what": what, "length": length}
                for name in args.models:
                    # Those of BERT are PyTorch's, the same on every device.
                    place = device if name == "m2_bert" else DEVICES[0]
                    launches = record(name, what, length, place, args.layers)
                    row[name] = predict(launches, device)
                    found = row[name]
                    print(
                        f"{device.name} {what:<8}{length:>6} {name:<10}"
                        f" predicted {found['ms']:8.2f} ms, {found['launches']:5d} launches,"
                        f" {found['bytes_per_token'] / 1e3:8.1f} KB and "
                        f"{found['operations_per_token'] / 1e6:7.1f} MFLOP a token",
                        flush=True,
                    )
                    if args.kernels:
                        show(found["rows"], args.kernels)
                if len(args.models) == 2:
                    ours, theirs = (row[name]["ms"] for name in MODELS)
                    row["speedup"] = theirs / ours
                    print(f"{'':>27}predicted: {theirs / ours:.2f}× BERT", flush=True)
                report["rows"].append(kept(row, device is DEVICES[0]))
    if fallbacks := failures():
        print(f"fell back to PyTorch: {fallbacks}")
    report["fallbacks"] = fallbacks
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "step_model.json"
    old = json.loads(path.read_text()) if path.exists() else {}

    def key(row: dict[str, Any]) -> tuple:
        return row["device"], row["what"], row["length"]

    if all(old.get(k) == report[k] for k in ("torch", "triton", "tokens", "layers")):
        done = {key(row) for row in report["rows"]}
        report["rows"] += [row for row in old["rows"] if key(row) not in done]  # not run again
    places = {d.name: i for i, d in enumerate(DEVICES)}
    report["rows"].sort(key=lambda row: (places[row["device"]], row["what"], row["length"]))
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
