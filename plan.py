"""Plan a run before it starts: does it fit, how long does it take, what does it cost, what will the loss be.

python plan.py --model configs/small.yaml --gpu 4090
python plan.py --model llama2-7b --gpu_memory 24                     # will it fit my 24 GB card?
python plan.py --model llama2-70b --gpu h100 --gpus 24 --per_node 4 --tokens 1e9 --price 2.5
python plan.py --published True                                      # the formulas against published runs
python plan.py --run out/tiny/pretrain
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cli.args import parse, run
from cli.flags import SET, Needs, check_flags
from cli.memory import check_memory
from files import write_json, write_text
from model_args import ModelArgs
from optim.args import OPTIMIZERS, OptimArgs
from planning import cluster, devices, launch, many, measure, memory, picture, published, runs, scaling, single
from planning.devices import GIB, Device
from planning.memory import Step
from planning.shapes import Source, find_shape, flags_of_shape
from planning.tables import bars, count, duration, gib, number, some_rows, spent, table
from training.flops import train_flops_per_token

NOTHING_FITS = 3  # exit status; 1 is that of mistakes, 2 that of the shell
MANY = "it describes several GPUs; give their number, or remove it"
ONE = "it belongs to the plan of one process; remove one of the two"
ROWS_OF_STEP = 64  # of one process, where nothing says how many: as in pretrain.py and fine_tuning.py
ALONE = "each prints a table of its own; remove one of the two"
NEEDS = (
    Needs("shape.*", "model", (None,), "a model has its own shape; remove one of the two"),
    Needs("per_node", "gpus", SET, MANY),
    Needs("node_link", "gpus", SET, MANY),
    Needs("gpu_link", "gpus", SET, MANY),
    Needs("rows", "gpus", (1,), ONE),
    Needs("lora_r", "gpus", (1,), ONE),
    Needs("measure", "gpus", (1,), ONE),
    Needs("measure", "gpu", (None,), "only this machine can be measured; remove one of the two"),
    Needs("model", "published", (False,), ALONE),
    Needs("run", "published", (False,), ALONE),
    Needs("model", "run", ((),), ALONE),
    Needs("picture", "published", (False,), ALONE),
    Needs("picture", "run", ((),), ALONE),
    Needs("launch", "gpus", SET, "one process needs no launch file; the plan prints its command"),
    Needs("launch", "tokens", SET, "the file says for how many steps; give --tokens"),
    Needs("price", "tokens or run", SET, "an amount needs a number of tokens, or a run"),
)


@dataclass(frozen=True)
class Args:
    """Plan a training run, or decoding: memory, time, cost and expected loss. Nothing is built or trained; the exit
    status is 3 where nothing fits."""

    model: str | None = None
    """a preset (configs/small.yaml), a model directory, a config.json, or a published name such as llama2-7b; without
    it, the shape is that of --shape"""
    shape: ModelArgs = field(default_factory=ModelArgs)
    gpu: str | None = None
    """GPU from the table of data sheets, such as h100, a100, 4090; default: this machine"""
    gpu_memory: Annotated[float | None, (0.001, 10_000)] = None
    """GiB of the device, instead of the table's; None: as the table or the machine says"""
    gpu_tflops: Annotated[float | None, (1e-6, 1e6)] = None
    """1e12 dense bfloat16 operations a second, likewise"""
    gpu_bandwidth: Annotated[float | None, (1e-6, 1e6)] = None
    """GB/s of the device's memory, likewise"""
    gpu_link: Annotated[float | None, (1e-6, 1e5)] = None
    """GB/s between GPUs of a node in one direction, likewise"""
    gpus: Annotated[int, (1, 1_000_000)] = 1
    """number of GPUs; above 1, strategies are ranked"""
    per_node: Annotated[int, (1, 1024)] = 8
    """GPUs in a node"""
    node_link: Annotated[float, (0.001, 1e5)] = 50.0
    """GB/s between nodes for each GPU in one direction (50: 400 Gbit/s InfiniBand for each)"""
    seq_len: Annotated[int | None, (1, 10**8)] = None
    """tokens of a row; None: as the preset says, else the model's context"""
    rows: Annotated[int | None, (1, 10**6)] = None
    """rows of a micro-batch in the table for one process; None: as the preset says, else 1"""
    batch_size: Annotated[int | None, (1, 10**7)] = None
    """rows of an optimizer step over all GPUs; None: as the preset says, else about 4 M tokens on several GPUs, and 64
    rows on one"""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """dtype of activations; auto: bf16 on a GPU, and on a CPU that has instructions for it"""
    optimizer: Literal[("auto", *OPTIMIZERS)] = "auto"  # type: ignore[valid-type]
    """auto: that of the preset, else adamw"""
    lora_r: Annotated[int, (1, 65536)] = 8
    """rank of the adapters in the rows on LoRA"""
    tokens: Annotated[float | None, (1, 1e18)] = None
    """tokens to train on, for which time, energy and loss are predicted; None: no prediction"""
    mfu: Annotated[float, (0.01, 1)] = 0.45
    """share of the peak that the products of a step reach by themselves; published runs: 0.33 to 0.56"""
    price: Annotated[float, (0, 1e6)] = 0
    """price of one GPU for an hour, in any currency; 0: no costs are printed"""
    measure: bool = False
    """measure steps of two small models on this machine for ten seconds, and predict the time of a step from them"""
    json: Path | None = None
    """new file for all numbers of the plan"""
    picture: Path | None = None
    """new picture of the memory by part: .png, .svg or .pdf"""
    launch: Path | None = None
    """new launch file for the fastest strategy that runs here: .slurm or .sbatch for SLURM, else for bash"""
    published: bool = False
    """print published runs beside the formulas, and nothing else"""
    run: tuple[Path, ...] = ()
    """directories of training runs: print their speed, time left and cost, and nothing else"""

    def __post_init__(self) -> None:
        """Raise ValueError where a flag needs another one to have another value."""
        check_flags(self, NEEDS)


if __name__ == "__main__":
    arguments = parse(Args, "plan")


def main(args: Args) -> dict[str, Any]:
    """Print what was asked for; return its numbers. SystemExit with status NOTHING_FITS where that is the answer."""
    check_outputs(args)
    if args.run:
        found = [runs.read(path) for path in args.run]
        print(runs.report(found, args.gpus, args.price or None, args.mfu))
        own = [{"seconds_left": run.left, "hfu": run.hfu, "predicted": run.predicted(args.mfu)} for run in found]
        result: dict[str, Any] = {"runs": [dataclasses.asdict(run) | more for run, more in zip(found, own)]}
    elif args.published:
        print(published.report(args.mfu))
        result = {"published": [row._asdict() for row in published.rows(args.mfu)]}
    else:
        result = plan(args)
    if args.json is not None:
        write_json(args.json, result)
    if result.get("fits") is False:
        raise SystemExit(NOTHING_FITS)
    return result


def check_outputs(args: Args) -> None:
    """Raise ValueError or OSError for a file that cannot be written, or that exists: nothing is overwritten."""
    for name in ("json", "picture", "launch"):
        path = getattr(args, name)
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"--{name} {path}: there is no directory {path.parent}; make it first")
        if path is not None and path.exists():
            raise FileExistsError(f"--{name} {path} exists already: choose another, or remove it")
    if args.picture is not None:
        picture.check_suffix(args.picture)


def plan(args: Args) -> dict[str, Any]:
    """Print a plan, section by section; return its numbers."""
    source = find_shape(args.model) if args.model else Source(args.shape, "--shape", flags_of_shape(args.shape))
    device, step = choose_device(args), choose_step(args, source)
    if step.dtype == "auto":
        step = replace(step, dtype="bf16" if device.is_gpu or devices.cpu_has_bfloat16() else "fp32")
    source = replace(source, flags=launch.own_flags(source, args.dtype, step.optimizer))
    where = choose_cluster(args, source, device, step) if args.gpus > 1 else None  # refused before anything is printed
    result = describe(source, step.seq_len)
    result |= plan_many(args, source, where, step) if where else plan_one(args, source, device, step)
    if args.tokens:
        result |= expect_loss(source.args, args.tokens, step.seq_len)
    if args.picture is not None:
        picture.draw(args.picture, result["memory"], devices.usable(device), f"{source.name} on {device.name}")
    return result


def choose_device(args: Args) -> Device:
    """Return the device of the flags. Raises ValueError for a name that is not in the table."""
    given = {
        "memory": (args.gpu_memory, GIB),
        "peak": (args.gpu_tflops, 1e12),
        "bandwidth": (args.gpu_bandwidth, 1e9),
        "link": (args.gpu_link, 1e9),
    }
    own = {name: value * unit for name, (value, unit) in given.items() if value is not None}
    if args.gpu:
        return replace(devices.find(args.gpu), **own)
    if "memory" in own:
        return replace(Device(f"a GPU of {args.gpu_memory:g} GiB", 0), **own)
    return replace(devices.this_machine(), **own)


def choose_step(args: Args, source: Source) -> Step:
    """Return the step that the flags, or else the preset, describe."""
    recipe = source.recipe
    preset_rows = recipe.train.micro_batch_size or source.batch_size if recipe else None
    optimizer, dtype = (recipe.optim.optimizer, recipe.train.dtype) if recipe else ("adamw", "auto")
    seq_len = args.seq_len or source.seq_len or source.args.max_seq_len
    return Step(
        rows=args.rows or preset_rows or 1,
        seq_len=seq_len,
        dtype={"fp16": "bf16"}.get(dtype, dtype) if args.dtype == "auto" else args.dtype,
        optimizer=optimizer if args.optimizer == "auto" else args.optimizer,
        galore_rank=recipe.optim.galore_rank if recipe else OptimArgs.galore_rank,
        checkpointing=bool(recipe and recipe.train.gradient_checkpointing),
    )


# ---- sections


def describe(source: Source, seq_len: int) -> dict[str, Any]:
    """Print and return parameters and operations."""
    parts, total = memory.parameters(source.args), source.args.n_parameters()
    flops = train_flops_per_token(source.args, seq_len)
    shares = [(f"  {name}", f"{n:,}", f"{n / total:.1%}") for name, n in parts.items() if n]
    print(table((f"{source.name}", f"{total:,}", "parameters"), shares))
    print(
        f"operations of training for a token in rows of {seq_len:,}: {flops:.4g} (6 for each weight in a product, "
        "12 L H D T for attention to all positions; recomputation is not counted)\n"
    )
    return {"parameters": parts | {"total": total}, "flops_per_token": flops}


def plan_one(args: Args, source: Source, device: Device, step: Step) -> dict[str, Any]:
    """Print and return what one process on a device needs: to train, to decode."""
    available = devices.usable(device)
    print(f"{device.name}: {gib(device.memory)}, of which {gib(available)} are counted on ({devices.SPARE})\n")
    found = list(single.ways(source.args, step, args.lora_r, available))
    print(single.table_of_ways(found, available), end="\n\n")
    parts = memory.training(source.args, step)
    again = ", blocks recomputed" * step.checkpointing
    print(
        f"all weights, {some_rows(step.rows)} of {step.seq_len:,} tokens, {step.dtype}, {step.optimizer}{again}, "
        "by part:"
    )
    print(bars(parts), end="\n\n")
    decoding = single.decoding(source.args, device, available, step.seq_len)
    print(single.table_of_decoding(decoding, step.seq_len), end="\n\n")
    print(single.verdict(found, decoding, available, source, rows_of_step(args, source)))
    result = {"device": dataclasses.asdict(device), "training": [dataclasses.asdict(way) for way in found]}
    result |= {"parts": parts, "decoding": decoding}
    result["fits"] = any(way.most_rows for way in found) or any(row["texts"] for row in decoding)
    result["memory"] = {way.name: memory.training(source.args, way.step) for way in found}
    if args.measure:
        result |= measured(args, source, step)
    elif args.tokens:
        result |= time_and_money(args, device, train_flops_per_token(source.args, step.seq_len))
    return result


def rows_of_step(args: Args, source: Source) -> int:
    """Return the rows of an optimizer step of one process."""
    return args.batch_size or source.batch_size or ROWS_OF_STEP


def measured(args: Args, source: Source, step: Step) -> dict[str, Any]:
    """Measure for ten seconds; print and return the time of a step on this machine, and of --tokens."""
    need = sum(memory.training(source.args.replace(n_layers=min(3, source.args.n_layers)), step).values())
    check_memory("--measure: a model of three blocks", need, "lower --rows or --seq_len")
    times = measure.measure(source.args, step)
    micro_batches = max(1, round(rows_of_step(args, source) / step.rows))
    seconds, tokens = times.step(micro_batches), micro_batches * step.rows * step.seq_len
    print(
        f"measured here, not compiled: {seconds:.3g} s for a step of {some_rows(micro_batches * step.rows)} "
        f"({times.update:.2g} s of them for the update), {tokens / seconds:,.0f} tokens/s"
    )
    if args.tokens:
        print(f"time: {count(args.tokens)} tokens take {duration(args.tokens / tokens * seconds)}")
    return {"step_seconds": seconds, "tokens_per_second": tokens / seconds}


def time_and_money(args: Args, device: Device, flops: float) -> dict[str, Any]:
    """Print and return the time, energy and cost of --tokens on one device."""
    if not device.peak:
        print(f"time: the speed of {device.name} is not known; give --measure True, --gpu or --gpu_tflops")
        return {}
    seconds = flops * args.tokens / (device.peak * args.mfu)
    costs = spent(seconds, 1, device.watts, args.price)
    print(f"time: {count(args.tokens)} tokens at {args.mfu:.0%} of the peak take {costs}")
    return {"seconds": seconds}


def expect_loss(shape: ModelArgs, tokens: float, seq_len: int) -> dict[str, Any]:
    """Print and return the loss that the scaling law expects, and the best size for the same operations."""
    n = shape.n_parameters()
    flops = 6 * n * tokens
    low, high = scaling.interval(n, tokens)
    best_n, best_d = scaling.optimal(flops)
    least, most = scaling.optimal_range(flops)
    print(
        f"loss: {scaling.loss(n, tokens):.2f} nats a token ({low:.2f} to {high:.2f}) after {number(tokens / n)} tokens "
        f"for each parameter, by the corrected law of Chinchilla (Besiroglu et al. 2024; Hoffmann et al. 2022 give "
        f"{scaling.loss(n, tokens, scaling.HOFFMANN):.2f}), for their tokenizer and data.\n"
        f"The best loss for the same {flops:.3g} operations: {count(best_n)} parameters "
        f"({count(least)} to {count(most)}) and {count(best_d)} tokens, {scaling.loss(best_n, best_d):.2f} nats."
    )
    if not (scaling.N_RANGE[0] <= n <= scaling.N_RANGE[1] and scaling.D_RANGE[0] <= tokens <= scaling.D_RANGE[1]):
        print("That lies outside of the fitted runs (44 M to 16 B parameters, 0.3 to 500 B tokens): an extrapolation.")
    expected = {"nats": scaling.loss(n, tokens), "interval": [low, high]}
    return {"loss": expected, "optimal": {"parameters": best_n, "range": [least, most], "tokens": best_d}}


def plan_many(args: Args, source: Source, where: cluster.Cluster, step: Step) -> dict[str, Any]:
    """Print and return the strategies for several GPUs, those that fit first."""
    device, found = where.device, many.find(source, where, step, args.tokens, args.price)
    nodes = f"{args.gpus} x {device.name}, {min(args.per_node, args.gpus)} in a node"
    print(
        f"{nodes}: {gib(device.memory)} each, of which {gib(devices.usable(device))} are counted on ({devices.SPARE})"
    )
    print(f"{where.batch_size:,} rows of {where.seq_len:,} tokens in a step; products at {args.mfu:.0%} of the peak\n")
    if found.fits:
        print(many.table_of_strategies(found), end="\n\n")
    for line in (*many.left_out(found), *many.conclusion(found)):
        print(line)
    if args.launch is not None:
        write_launch(args, found)
    rows, all_of_them = [], [*found.fits, *found.others]
    for each in all_of_them:
        run_by = launch.Launch(source, where, step, each)
        refused = run_by.refusal()
        how = {"command": None if refused else run_by.command(), "refused": refused}
        rows.append(dataclasses.asdict(each) | {"total": each.total, "fits": each in found.fits} | how)
    by_part = {each.strategy.label: each.memory for each in all_of_them}
    result = {"device": dataclasses.asdict(device), "strategies": rows, "memory": by_part, "fits": bool(found.fits)}
    return result | {"undivided": cluster.undivided(source.args, where)}


def choose_cluster(args: Args, source: Source, device: Device, step: Step) -> cluster.Cluster:
    """Return the cluster of the flags. Raises ValueError for numbers that do not divide, or a device without rates."""
    if not device.peak:
        raise ValueError(f"--gpus {args.gpus} needs the speed of {device.name}: give --gpu NAME, or --gpu_tflops")
    if args.gpus > args.per_node and args.gpus % args.per_node:
        raise ValueError(
            f"--gpus {args.gpus} is not a multiple of --per_node {args.per_node}: a node has that many; change one"
        )
    rows = max(1.0, 4e6 / step.seq_len / args.gpus)  # for each GPU; a power of 2 divides into micro-batches
    default = args.gpus * 2 ** round(math.log2(rows))
    batch_size = args.batch_size or source.batch_size or default
    sizes = (args.gpus, args.per_node, args.node_link * 1e9, args.mfu, step.seq_len, batch_size)
    return cluster.Cluster(device, *sizes, loaded=source.command.startswith("--init_from"))


def write_launch(args: Args, found: many.Found) -> None:
    """Write the launch file of the fastest strategy that is run here. Raises ValueError where only others fit."""
    if not found.fits:
        print(f"--launch {args.launch}: no strategy fits; nothing is written")
        return
    able, _ = found.able()
    if not able:
        raise ValueError(f"--launch {args.launch}: no strategy that this repository runs fits; nothing is written")
    slurm = args.launch.suffix in (".slurm", ".sbatch")
    write_text(args.launch, able[0].file(launch.made_by(args), args.tokens, slurm))
    print(f"{args.launch}: {able[0].found.strategy.label}, by {'sbatch' if slurm else 'bash'}")


if __name__ == "__main__":
    run(main, arguments)
