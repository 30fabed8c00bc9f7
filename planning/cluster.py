"""Many GPUs: what each strategy keeps on a GPU, how long a step takes, and which ones fit.

States of a parameter on a GPU, as the backends of this repository keep them: float32 weight 4 bytes, float32 gradient
4, and AdamW's two moments 8; DeepSpeed's ZeRO keeps a float32 copy of its part of the weights beside them, 12. Weights
and gradients also travel in float32. 3D is tensor x pipeline x data, over which FSDP2 divides what is left. Messages go
around a ring: r - 1 of r parts pass every GPU. Under ZeRO every process holds the whole model, in float32, before it is
divided: `Prediction.start`.

The time of a step is compute / (1 - bubble) + the communication that no compute hides:
    compute      model operations (4/3 of them when blocks are recomputed) / (GPUs x peak x `efficiency`)
    gradients    hidden behind the backward pass of the last micro-batch (2/3 of its time)
    shards       gathered (ZeRO-3) behind the compute of every micro-batch
    tensors      not hidden: the next product waits for the sum
    stages       not hidden; small
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from model_args import ModelArgs
from planning.devices import GPUS, Device, usable
from planning.memory import Step, cast_weights, logits_block, matrices, saved_by_block, saved_outside, training
from planning.tables import gib, some_rows
from training.flops import train_flops_per_token

MOST_ROWS = 64  # of a micro-batch
PCIE = 25e9  # bytes a second between a GPU and the host, for states that are kept there
HOST = 32e9  # parameters' bytes a second that a CPU's AdamW updates, for one GPU


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes, and what is trained on them."""

    device: Device
    gpus: int
    per_node: int
    node_link: float
    """bandwidth between nodes, bytes a second for each GPU in one direction"""
    efficiency: float
    """share of the peak that the products of a step reach by themselves"""
    seq_len: int
    batch_size: int
    """rows of an optimizer step, over all GPUs"""
    loaded: bool = False
    """whether the model is that of --init_from, which every GPU gets as a whole before it is divided"""

    def link(self, members: int) -> float:
        """Return the bytes a second between neighbours in groups of this many GPUs that follow each other."""
        inside = self.device.link or self.node_link
        return inside if members <= self.per_node else min(inside, self.node_link)


@dataclass(frozen=True)
class Strategy:
    """One way to divide the work."""

    name: str
    """DDP, FSDP2, ZeRO-1, ZeRO-2, ZeRO-3 (DeepSpeed) or 3D (tensor x pipeline x data, with FSDP2 over data)"""
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    offload: bool = False
    """whether the optimizer's states are on the host"""

    @property
    def label(self) -> str:
        """Name for a table."""
        sizes = f" TP{self.tensor} PP{self.pipeline} DP{self.data}" if self.name == "3D" else ""
        return self.name + sizes + ", offload" * self.offload


@dataclass(frozen=True)
class Prediction:
    """What a strategy takes."""

    strategy: Strategy
    rows: int
    """rows of a micro-batch"""
    checkpointing: bool
    memory: dict[str, float]
    """bytes on the fullest GPU, by part"""
    seconds: float
    """duration of an optimizer step"""
    bubble: float
    """share of the step in which a stage waits"""
    volume: float
    """bytes that a GPU sends in a step"""
    waiting: float
    """seconds of communication that no compute hides"""
    mfu: float
    tokens_per_second: float
    start: float = 0.0
    """bytes of the whole model on every GPU, before it is divided; 0 where each makes its part only"""

    @property
    def total(self) -> float:
        """The most bytes on the fullest GPU."""
        return max(self.start, sum(self.memory.values()))

    @property
    def size(self) -> str:
        """The same in words; says so where it is the start that takes most."""
        at_start = " at the start, when every GPU holds the whole model" if self.total == self.start else ""
        return gib(self.total) + at_start


def strategies(args: ModelArgs, cluster: Cluster) -> Iterator[Strategy]:
    """Yield the strategies whose sizes divide the model and use every GPU."""
    n = cluster.gpus
    for name in ("DDP", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3"):
        yield Strategy(name, data=n)
    yield Strategy("ZeRO-2", data=n, offload=True)
    yield Strategy("ZeRO-3", data=n, offload=True)
    within = math.gcd(args.n_heads, args.n_kv_heads, args.hidden_dim, cluster.per_node)
    for tensor in divisors(math.gcd(within, n)):
        for pipeline in divisors(math.gcd(args.n_layers, n // tensor)):
            if tensor * pipeline > 1:
                yield Strategy("3D", tensor, pipeline, n // tensor // pipeline)


def divisors(n: int) -> list[int]:
    """Return the numbers that divide n, in order."""
    return [each for each in range(1, n + 1) if n % each == 0]


# ---- memory


def stage_of(args: ModelArgs, strategy: Strategy) -> ModelArgs:
    """Return the shape of the fullest stage: its layers, and, where there are several stages, one table of two."""
    tied = args.tie_embeddings or strategy.pipeline > 1
    return args.replace(n_layers=args.n_layers // strategy.pipeline, tie_embeddings=tied)


def share(args: ModelArgs, strategy: Strategy) -> float:
    """Return the parameters on the GPU that has most of them, before data ranks divide them: its part of a stage."""
    return (stage_of(args, strategy).n_parameters() - args.dim) / strategy.tensor + args.dim


def states(args: ModelArgs, strategy: Strategy, step: Step) -> dict[str, float]:
    """Return the bytes of weights, gradients and optimizer on a GPU, under any strategy but DDP."""
    p, n = share(args, strategy), strategy.data
    kept = {"weights": 4 * p, "gradients": 4 * p, "optimizer": 12 * p}
    if strategy.name in ("FSDP2", "3D"):
        kept["optimizer"] = training(stage_of(args, strategy), step)["optimizer"] / strategy.tensor
    if n == 1:
        return kept
    zero = {"ZeRO-1": 1, "ZeRO-2": 2}.get(strategy.name, 3)
    for name, least in (("optimizer", 1), ("gradients", 2), ("weights", 3)):
        kept[name] /= n if zero >= least else 1
    if strategy.pipeline > 1:  # torch's schedules reduce gradients, and let weights go, after the last micro-batch
        kept |= {"gradients": 4 * p, "gathered": 4 * p}
    elif zero == 3:  # whole at a time: the present block, the next that is gathered, one gradient; the tables
        tables = args.vocab_size * args.dim * (1 if args.tie_embeddings else 2)
        kept["gathered"] = 4 * (3 * matrices(args) + tables) / strategy.tensor
    if strategy.offload:
        kept["optimizer"] = 0
    return kept


def activations(args: ModelArgs, strategy: Strategy, step: Step, micro_batches: int) -> dict[str, float]:
    """Return the bytes of activations and logits of 3D on the first or last stage, whichever has more.

    TP divides them by tokens or heads; the inputs of attention, feed-forward and head are gathered, and kept whole. In
    1F1B the first of p stages holds up to p micro-batches at once; each has its own copies of weights in bf16.
    """
    t, p = strategy.tensor, strategy.pipeline
    layers, in_flight = args.n_layers / p, min(p, micro_batches)
    inputs = step.itemsize * step.rows * step.seq_len * args.dim
    gathered = inputs * (1 - 1 / t)  # what a GPU has of a whole input beside its own part
    block = saved_by_block(args, step) / t + 2 * gathered + cast_weights(args, step) / t
    kept, again = (inputs / t, block) if step.checkpointing else (block, 0)  # of a block and micro-batch; besides
    loss = saved_outside(args, step) / t + gathered + logits_block(args.replace(vocab_size=args.vocab_size // t), step)
    if p == 1:
        return {"activations": layers * kept + again, "logits and loss": loss}
    return {"activations": max(in_flight * layers * kept, layers * kept + loss) + again}


# ---- time


def communication(args: ModelArgs, strategy: Strategy, step: Step, micro_batches: int, cluster: Cluster) -> list[tuple]:
    """Return (bytes that a GPU sends in a step, bytes a second, what hides them: "last", "all" or "") of each kind."""
    t, p, n = strategy.tensor, strategy.pipeline, strategy.data
    ring = (n - 1) / n
    rate = cluster.link(t * n)
    gradient = 4 * share(args, strategy)
    kinds: list[tuple] = []
    if p > 1:  # gather for forward and backward of every micro-batch; reduce gradients once, behind the last one
        kinds.append((2 * ring * gradient * micro_batches, rate, "all"))
        kinds.append((ring * gradient, rate, ""))
    elif strategy.name in ("ZeRO-3", "FSDP2", "3D"):  # gather twice, reduce gradients: every micro-batch
        kinds.append((3 * ring * gradient * micro_batches, rate, "all"))
    elif strategy.name == "ZeRO-2":  # gradients of every micro-batch, because nobody keeps all; weights once
        kinds.append((ring * gradient * micro_batches, rate, "all"))
        kinds.append((ring * gradient, rate, ""))
    else:  # an all-reduce, or reduce-scatter and all-gather of the same size
        kinds.append((2 * ring * gradient, rate, "last"))
    hidden = step.itemsize * step.rows * step.seq_len * args.dim
    if t > 1:  # two sums a block in each direction; recomputation repeats those of the forward pass
        sums = args.n_layers / p * (6 if step.checkpointing else 4) * micro_batches
        kinds.append((sums * 2 * (t - 1) / t * hidden, cluster.link(t), ""))
    if p > 1:
        kinds.append((2 * hidden / t * micro_batches, cluster.link(cluster.gpus), ""))
    if strategy.offload:  # gradients to the host, updated weights back
        kinds.append((8 * share(args, strategy) / n, PCIE, ""))
    return kinds


def predict(args: ModelArgs, strategy: Strategy, step: Step, cluster: Cluster) -> Prediction | None:
    """Return what a strategy takes with these rows of a micro-batch; None where the rows of a step do not divide, or
    are fewer than the stages."""
    rows_of_rank, rest = divmod(cluster.batch_size, strategy.data)
    if rest or rows_of_rank % step.rows or rows_of_rank // step.rows < strategy.pipeline:
        return None
    micro_batches = rows_of_rank // step.rows
    tokens = cluster.batch_size * cluster.seq_len
    flops = train_flops_per_token(args, cluster.seq_len) * tokens
    work = flops * (4 / 3 if step.checkpointing else 1)
    compute = work / (cluster.gpus * cluster.device.peak * cluster.efficiency)
    hides = {"last": compute / micro_batches * 2 / 3, "all": compute, "": 0.0}
    kinds = communication(args, strategy, step, micro_batches, cluster)
    waiting = sum(max(0.0, size / rate - hides[hidden_by]) for size, rate, hidden_by in kinds)
    if strategy.offload:  # the CPU's AdamW
        waiting += 4 * share(args, strategy) / strategy.data / HOST
    bubble = (strategy.pipeline - 1) / (micro_batches + strategy.pipeline - 1)
    seconds = compute / (1 - bubble) + waiting
    if strategy.name == "3D":
        memory: dict[str, float] = states(args, strategy, step) | activations(args, strategy, step, micro_batches)
    else:  # activations as one process has them
        memory = dict(training(args, step)) | ({} if strategy.name == "DDP" else states(args, strategy, step))
    mfu = flops / seconds / (cluster.gpus * cluster.device.peak)
    volume = sum(size for size, *_ in kinds)
    start = 4.0 * args.n_parameters() if starts_whole(args, strategy, cluster) else 0.0
    chosen = (strategy, step.rows, step.checkpointing, memory, seconds, bubble, volume, waiting, mfu, tokens / seconds)
    return Prediction(*chosen, start)


def starts_whole(args: ModelArgs, strategy: Strategy, cluster: Cluster) -> bool:
    """Return whether every process holds the whole model before it is divided (docs/distributed.md)."""
    clex = (args.rope_scaling or {}).get("rope_type") == "clex"  # it draws weights of its own
    return strategy.name not in ("FSDP2", "3D") or cluster.loaded or clex


def undivided(args: ModelArgs, cluster: Cluster) -> dict[str, list[str]]:
    """Return the labels of the strategies that cannot divide the rows of a step, by the reason."""
    found: dict[str, list[str]] = {}
    for strategy in strategies(args, cluster):
        rows, rest = divmod(cluster.batch_size, strategy.data)
        if rest:
            most = strategy.data * math.ceil(cluster.batch_size / strategy.data)
            why = f"{cluster.batch_size} rows of a step do not divide over {strategy.data} data ranks"
            found.setdefault(f"{why}: take a multiple, such as --batch_size {most}", []).append(strategy.label)
        elif rows < strategy.pipeline:
            why = f"{some_rows(rows)} for each data rank, fewer than {strategy.pipeline} stages"
            least = strategy.data * strategy.pipeline
            found.setdefault(f"{why}: --batch_size {least} is the least", []).append(strategy.label)
    return found


def best_of(args: ModelArgs, strategy: Strategy, step: Step, cluster: Cluster) -> Prediction | None:
    """Return the fastest prediction of a strategy that fits, over micro-batches with and without recomputation; the
    smallest in memory where none fits; None where no micro-batch divides."""
    options = []
    for checkpointing in (False, True):
        for rows in (2**i for i in range(int(math.log2(MOST_ROWS)) + 1)):
            option = predict(args, strategy, replace(step, rows=rows, checkpointing=checkpointing), cluster)
            options += [option] if option else []
    fitting = [each for each in options if each.total <= usable(cluster.device)]
    if fitting:  # of equally fast ones that with the most rows: its products are larger
        return min(fitting, key=lambda each: (round(each.seconds, 6), -each.rows))
    return min(options, key=lambda each: each.total, default=None)


def rank(args: ModelArgs, step: Step, cluster: Cluster) -> tuple[list[Prediction], list[Prediction]]:
    """Return the strategies that fit, the fastest first, and those that do not, the smallest first.

    Raises ValueError where no strategy can divide the rows of a step.
    """
    found = [best_of(args, strategy, step, cluster) for strategy in strategies(args, cluster)]
    known = [each for each in found if each]
    if not known:
        raise ValueError(
            f"--batch_size {cluster.batch_size} does not divide into --gpus {cluster.gpus} under any strategy: take a "
            f"multiple, such as {cluster.gpus * max(1, round(cluster.batch_size / cluster.gpus))}"
        )
    fits = [each for each in known if each.total <= usable(cluster.device)]
    others = [each for each in known if each.total > usable(cluster.device)]
    return sorted(fits, key=lambda each: each.seconds), sorted(others, key=lambda each: each.total)


def more_gpus(args: ModelArgs, step: Step, cluster: Cluster) -> tuple[int, Prediction] | None:
    """Return the smallest of some larger numbers of the same GPUs on which a strategy fits, and that strategy; None
    where none does. Rows of a step are as many more as are needed to divide."""
    parts = [n for n in divisors(cluster.per_node) if n < cluster.per_node]  # of one node
    wholes = {cluster.per_node * stages * 2**power for stages in divisors(args.n_layers) for power in range(6)}
    for count in sorted(n for n in {*parts, *wholes} if n > cluster.gpus):
        rows = -(-cluster.batch_size // count) * count
        fits, _ = rank(args, step, replace(cluster, gpus=count, batch_size=rows))
        if fits:
            return count, fits[0]
    return None


def larger_gpu(
    args: ModelArgs, step: Step, cluster: Cluster, devices: Iterable[Device]
) -> tuple[Device, Prediction] | None:
    """Return the smallest device on as many of which a strategy fits, and that strategy; None where none does."""
    for device in sorted(devices, key=lambda each: each.memory):
        fits, _ = rank(args, step, replace(cluster, device=device))
        if fits:
            return device, fits[0]
    return None


def what_fits(args: ModelArgs, step: Step, cluster: Cluster) -> Iterator[str]:
    """Yield, where nothing fits, the nearest numbers and kinds of GPUs on which a strategy does."""
    more, larger = more_gpus(args, step, cluster), larger_gpu(args, step, cluster, GPUS.values())
    if more:
        yield f"It fits on --gpus {more[0]} of them, by {more[1].strategy.label} in {gib(more[1].total)} of each."
    if larger:
        yield f"It fits on {cluster.gpus} x --gpu {larger[0].name}, by {larger[1].strategy.label}."
    if not more and not larger:
        yield "No number and no kind of GPU that is known here holds it: a shorter --seq_len or a smaller model does."
