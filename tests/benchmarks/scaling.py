"""Memory, communication and speed of M2-BERT-large on many GPUs, by arithmetic alone.

    python tests/benchmarks/scaling.py

Nothing here was measured: figures follow from the sizes of the tensors and from the device's data
sheet. `report.py` writes them into README.md.

Dimension key: P parameters, D hidden size, L length, V vocabulary, B sequences in a step.
"""

from dataclasses import dataclass

import floors

PARAMETERS, HIDDEN, LAYERS, LENGTH, VOCABULARY = 341_038_144, 1792, 12, 128, 30_528
BATCH, MICROBATCH, MASKED = 4096, 128, 0.3
GPUS = (1, 8, 16, 64, 256, 512)
NODE = 8

# An H100 SXM by its data sheet: bf16 without sparsity, HBM3, NVLink in one direction.
OPERATIONS, BANDWIDTH, NVLINK = 989e12, 3.35e12, 450e9
# What a node's network carries in one direction: eight cards of 400 Gb/s, or one of 100 Gb/s.
NETWORKS = {"8 × 400 Gb/s": 400e9, "100 Gb/s": 12.5e9}
EFFICIENCY = 0.5  # of the floor: what kernels are assumed to reach; links are taken at their best

# Bytes a parameter: fp32 weight, gradient and Adam's two moments; DDP's buckets hold gradients
# once more; autocast, and FSDP where it gathers, keep a copy in bf16.
STATE, BUCKETS, COPY = 16, 4, 2
# Bytes that autograd keeps of a layer for each token and channel, where the kernels run: the
# mixer's input twice (for its projection and for the residual convolution), the projection (three
# times as wide), the mixer's core, the MLP's input, and in fp32 the layer norm's input.
SAVED = 2 + 2 + 3 * 2 + 2 + 2 + 4
LAYER_INPUT = 4  # fp32: all that remains of a layer under activation checkpointing
LOGITS = 2 + 4 + 4  # bf16; fp32 and its gradient in the loss
CAST = 4 + 2  # a weight read in fp32 and written in bf16
# How often Composer's DecoupledAdamW, a loop of torch ops, reads or writes an fp32 number of a
# parameter's size, counted in its source; and the clipping of its gradient.
PASSES = 22 + 3


@dataclass(frozen=True)
class Setting:
    """How a model is spread: `shard` GPUs share weights, gradients and moments."""

    name: str
    shard: int = 1
    checkpointing: bool = False

    def state(self) -> float:
        """Bytes of weights, gradients and moments on each GPU."""
        if self.shard == 1:
            return PARAMETERS * (STATE + BUCKETS + COPY)
        return PARAMETERS * (STATE / self.shard + COPY)

    def activations(self) -> float:
        """Bytes that a microbatch keeps for its backward pass."""
        tokens = MICROBATCH * LENGTH
        layers = HIDDEN * LAYERS * SAVED
        if self.checkpointing:
            layers = HIDDEN * (LAYERS * LAYER_INPUT + SAVED)
        return tokens * (layers + MASKED * VOCABULARY * LOGITS)

    def total(self) -> float:
        """Bytes."""
        return self.state() + self.activations()


def works() -> tuple[list[floors.Work], floors.Work]:
    """Of one token's forward pass: the ops of a layer, and the head at a masked position."""
    projections = [(8 * HIDDEN, 6 * HIDDEN**2), (4 * HIDDEN, 2 * HIDDEN**2)]  # in, out
    layer = [floors.Work(moved, operations) for moved, operations in projections]
    core = floors.gated_long_conv(1, HIDDEN)
    layer.append(floors.Work(core.bytes, floors.toeplitz_operations(1, HIDDEN, LENGTH)))
    layer.append(floors.Work(4 * HIDDEN, 2 * floors.mlp_weights(HIDDEN)))
    layer.append(floors.Work(10 * HIDDEN, 0))  # residual and layer norm
    return layer, floors.Work(LOGITS * VOCABULARY, 2 * HIDDEN * (HIDDEN + VOCABULARY))


def token_seconds() -> float:
    """Floor of a token in a training step, the backward pass as two forward ones."""
    layer, head = works()
    seconds = LAYERS * sum(work.seconds(BANDWIDTH, OPERATIONS) for work in layer)
    return 3 * (seconds + MASKED * head.seconds(BANDWIDTH, OPERATIONS))


def token_operations() -> float:
    """Operations of a token in a training step."""
    layer, head = works()
    operations = LAYERS * sum(work.operations or 0 for work in layer)
    return 3 * (operations + MASKED * (head.operations or 0))


def all_reduce_seconds(size: float, gpus: int, network: float) -> float:
    """Of a ring that crosses the boundary of a node once, on all its cards."""
    inside = min(gpus, NODE)
    nodes = gpus // inside
    seconds = 2 * (inside - 1) / inside * size / NVLINK
    return seconds + 2 * (nodes - 1) / nodes * size / network


@dataclass(frozen=True)
class Step:
    """Milliseconds of one step on a GPU, and thousand tokens/s."""

    compute: float
    reduce: float
    update: float
    rate: float


def step(gpus: int, sharded: bool, network: float) -> Step:
    """One step of the published batch.

    Args:
        gpus: How many there are.
        sharded: Weights sharded over the GPUs of a node, gradients in bf16, reduced in every
            microbatch; else DDP, which reduces fp32 with the last one.
        network: Bytes/s in and out of a node.
    """
    microbatches = max(1, BATCH // gpus // MICROBATCH)
    touched = PARAMETERS * (CAST + 3 * COPY) * microbatches  # weights made bf16, and read thrice
    compute = (BATCH * LENGTH / gpus * token_seconds() + touched / BANDWIDTH) / EFFICIENCY
    size = PARAMETERS * (COPY if sharded else 4)
    reduce = all_reduce_seconds(size, gpus, network) * (microbatches if sharded else 1)
    backward = 2 / 3 * compute / (1 if sharded else microbatches)
    share = min(gpus, NODE) if sharded else 1
    update = PARAMETERS / share * 4 * PASSES / BANDWIDTH / EFFICIENCY
    seconds = compute + max(0.0, reduce - backward) + update
    rate = BATCH * LENGTH / gpus / seconds
    return Step(1e3 * compute, 1e3 * reduce, 1e3 * update, rate / 1e3)


SETTINGS = (
    Setting("DDP"),
    Setting("DDP, activation checkpointing", checkpointing=True),
    Setting("sharded over 8", shard=8),
    Setting("sharded over 8, activation checkpointing", shard=8, checkpointing=True),
)


def main() -> None:
    for setting in SETTINGS:
        state, kept = setting.state() / 1e9, setting.activations() / 1e9
        print(f"{setting.name}: {state:.1f} + {kept:.1f} GB")
    print(f"floor: {1 / token_seconds():,.0f} tokens/s")
    for gpus in GPUS:
        for name, network in NETWORKS.items():
            for sharded in (False, True):
                print(f"{gpus:4d} GPUs, {name}, sharded: {sharded}: {step(gpus, sharded, network)}")


if __name__ == "__main__":
    main()
