"""Checkpoints of DeepSpeed: files as ZeRO cuts them, number by number, and DeepSpeed's own reader of them."""

import contextlib
import enum
import io
import math
import os
from pathlib import Path

import pytest
import torch
from helpers.small_checkpoints import KINDS, TOKENS, saved

import convert
from checkpoint.directory import load_model
from convert import Import


class Stage(enum.Enum):  # DeepSpeed's files name classes of its own
    THREE = 3


def parts_of(tensors: list[torch.Tensor], stage: int, world: int) -> list[torch.Tensor]:
    """The flat part of each rank."""
    rows: list[list[float]] = [[] for _ in range(world)]
    if stage == 3:
        for tensor in tensors:
            numbers, size = tensor.flatten().tolist(), math.ceil(tensor.numel() / world)
            numbers += [7.0] * (size * world - len(numbers))
            for rank in range(world):
                rows[rank] += numbers[rank * size : (rank + 1) * size]
    else:
        numbers = [x for tensor in tensors for x in tensor.flatten().tolist()]
        numbers += [7.0] * (-len(numbers) % (2 * world))
        size = len(numbers) // world
        rows = [numbers[rank * size : (rank + 1) * size] for rank in range(world)]
    return [torch.tensor(row) for row in rows]


def write(folder: Path, model, stage: int, world: int, frozen: str = "nothing") -> Path:
    """Write a checkpoint whose bf16 weights are all wrong, so that only the float32 parts are right."""
    here = folder / "global_step7"
    here.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    own = {f"module.{name}": p.detach() for name, p in model.named_parameters()}
    held = {name: p for name, p in own.items() if frozen in name}
    groups = [{n: p for n, p in own.items() if n not in held and (p.dim() == 1) == vector} for vector in (False, True)]
    shared = {"module.lm_head.weight": "module.model.embed_tokens.weight"} if model.args.tie_embeddings else {}
    whole = {n: p if n in held else torch.zeros_like(p, dtype=torch.bfloat16) for n, p in own.items()}
    cut = {name: parts_of([p], 3, world) for name, p in held.items()}
    for rank in range(world if stage == 3 else 1):
        state = {
            "module": {n: torch.empty(0) for n in own} if stage == 3 else whole,
            "buffer_names": [],
            "param_shapes": [{name: p.shape for name, p in group.items()} for group in groups],
            "frozen_param_shapes": {name: p.shape for name, p in held.items()} if stage > 1 else None,
            "frozen_param_fragments": {n: cut[n][rank] if stage == 3 else held[n] for n in held} if stage > 1 else None,
            "shared_params": shared,
            "ds_version": "0.19.8",
        }
        torch.save(state, here / (f"zero_pp_rank_{rank}_" * (stage == 3) + "mp_rank_00_model_states.pt"))
    flats = [parts_of(list(group.values()), stage, world) for group in groups]
    for rank in range(world):
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        optimizer = {key: [flat[rank] for flat in flats], "zero_stage": stage, "class": Stage.THREE}
        optimizer["partition_count"] = world if stage == 3 else [world, world]
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer, "ds_config": {}}, here / name)
    return folder


@pytest.mark.parametrize("stage, world", [(1, 3), (2, 1), (2, 4), (3, 2), (3, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_float32_weights_of_all_ranks_are_joined(kind, stage, world, tmp_path):
    frozen = {"tied": "layers.1.mlp", "untied": "embed_tokens"}.get(kind, "nothing")
    model = saved(tmp_path / "base", **KINDS[kind])
    source = write(tmp_path / "run", model, stage, world, frozen)
    convert.import_(Import(source=source, out=tmp_path / "got", like=tmp_path / "base"))
    got = load_model(tmp_path / "got")
    assert got.args == model.args and torch.equal(got(TOKENS), model(TOKENS))
    if kind == "tied" and stage > 1:
        their_reader_agrees(source, model)


def their_reader_agrees(source: Path, model) -> None:
    """DeepSpeed's own reader has the same numbers, so the files are as it writes them."""
    theirs = pytest.importorskip("deepspeed.utils.zero_to_fp32")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        state = theirs.get_fp32_state_dict_from_zero_checkpoint(str(source))
    own = dict(model.named_parameters())
    assert state.keys() == {f"module.{name}" for name in [*own, "lm_head.weight"]}
    assert all(torch.equal(state[f"module.{name}"], p) for name, p in own.items())


def test_the_shape_is_that_of_a_config_beside_or_of_like(tmp_path, capsys):
    model = saved(tmp_path / "base", n_kv_heads=2)
    source = write(tmp_path / "run", model, 2, 2)
    with pytest.raises(ValueError, match=r"add --max_seq_len and --n_heads and .*, or --like DIR with a config\.json"):
        convert.import_(Import(source=source, out=tmp_path / "got"))
    (source / "config.json").write_bytes((tmp_path / "base/config.json").read_bytes())
    convert.import_(Import(source=source / "global_step7", out=tmp_path / "got"))  # one of several may be named
    assert load_model(tmp_path / "got").args == model.args
    with pytest.raises(ValueError, match=r"--n_heads has no effect: .*config\.json says it; remove it"):
        convert.import_(Import(source=source, out=tmp_path / "never", n_heads=4))
    with pytest.raises(FileNotFoundError, match="expected a Hugging Face directory"):
        convert.import_(Import(source=source, out=tmp_path / "never", like=tmp_path))
    saved(tmp_path / "wider", n_kv_heads=2, hidden_dim=48)
    with pytest.raises(ValueError, match=r"shapes than its settings say: model\.layers\.0\.mlp\.gate_proj\.weight"):
        convert.import_(Import(source=source, out=tmp_path / "never", like=tmp_path / "wider"))
    with pytest.raises(ValueError, match="--like has no effect with a Hugging Face directory"):
        convert.import_(Import(source=tmp_path / "base", out=tmp_path / "never", like=tmp_path / "base"))


def test_without_the_parts_of_the_optimizer(tmp_path, capsys):
    model = saved(tmp_path / "base")
    for stage in (2, 3):
        for path in write(tmp_path / f"run{stage}", model, stage, 2).glob("*/*optim*"):
            path.unlink()
    convert.import_(Import(source=tmp_path / "run2", out=tmp_path / "got", like=tmp_path / "base"))
    assert "the weights are those the model computed with, in bfloat16" in capsys.readouterr().err
    assert not load_model(tmp_path / "got").model.norm.weight.any()
    with pytest.raises(ValueError, match=r"has no \*_optim_states\.pt, in which the weights of stage 3 are"):
        convert.import_(Import(source=tmp_path / "run3", out=tmp_path / "never", like=tmp_path / "base"))


def test_files_that_are_missing_damaged_or_of_another_kind_are_refused(tmp_path):
    model = saved(tmp_path / "base")
    source = write(tmp_path / "run", model, 3, 3)
    here = source / "global_step7"

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            convert.import_(Import(source=source, out=tmp_path / "got", like=tmp_path / "base"))
        assert not (tmp_path / "got").exists()

    last, middle = (here / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (2, 1))
    last.rename(tmp_path / "last")
    refused(r"is of 3 ranks, and has \*_optim_states\.pt of 2")
    (tmp_path / "last").rename(last)
    middle.rename(tmp_path / "middle")
    refused(r"lacks the \*_optim_states\.pt of rank 1")
    middle.write_bytes((tmp_path / "middle").read_bytes()[:-600])
    refused("cannot be read as a PyTorch checkpoint")
    torch.save({"optimizer_state_dict": {"fp32_flat_groups": [torch.zeros(5), torch.zeros(1)]}}, middle)
    refused("names parameters of .* numbers, and the files of the ranks hold 6")
    (tmp_path / "middle").rename(middle)
    other = here / "zero_pp_rank_0_mp_rank_01_model_states.pt"
    other.write_bytes(b"")
    refused("of a model cut by tensor parallelism")
    other.rename(here / "layer_00-model_00-model_states.pt")
    refused("of a model cut by pipeline stages or experts")


def test_a_pickle_that_wants_to_execute_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it_ran"),)

    source = write(tmp_path / "run", saved(tmp_path / "base"), 2, 1)
    path = next(source.glob("*/*optim*"))
    torch.save(torch.load(path, weights_only=False) | {"more": Evil()}, path)
    with pytest.raises(
        ValueError, match=r"is refused: it is a pickle that asks for \S+mkdir, and nothing of it was run"
    ):
        convert.import_(Import(source=source, out=tmp_path / "got", like=tmp_path / "base"))
    assert not (tmp_path / "it_ran").exists() and not (tmp_path / "got").exists()
