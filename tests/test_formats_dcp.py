"""Checkpoints of torch.distributed.checkpoint whose tensors are cut over ranks, against its own reader."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.small_checkpoints import KINDS, TOKENS, saved
from test_formats_pth import meta_state
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import convert
from checkpoint.directory import load_model
from convert import Import


def write(folder: Path, state: dict[str, torch.Tensor], world: int) -> Path:
    """Write what FSDP2 writes: the rows of every tensor over the ranks, the last of which may have fewer, or none."""
    folder.mkdir(parents=True)
    tensors, places = {}, {}
    for rank in range(world):
        name, file = f"__{rank}_0.distcp", io.BytesIO()
        for key, tensor in state.items():
            each = -(-len(tensor) // world)
            part = tensor[rank * each : (rank + 1) * each]
            if len(part):
                start = torch.Size([rank * each, *[0] * (tensor.dim() - 1)])
                own = TensorProperties(tensor.dtype, requires_grad=True)
                entry = tensors.setdefault(key, TensorStorageMetadata(own, tensor.shape, []))
                entry.chunks.append(ChunkStorageMetadata(start, part.shape))
                begin = file.tell()
                torch.save(part.clone(), file)
                places[MetadataIndex(key, start, rank)] = _StorageInfo(name, begin, file.tell() - begin)
        (folder / name).write_bytes(file.getvalue())
    tensors["step"] = BytesStorageMetadata()
    places[MetadataIndex("step")] = _StorageInfo("__0_0.distcp", 0, 1)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(tensors, {"step": ("step",)}, places)))
    return folder


def trained(model) -> dict[str, torch.Tensor]:
    """A training state: the weights under `model.`, with what wrappers put into names, and an optimizer's moments."""
    own = {name: p.detach() for name, p in model.named_parameters()}
    weights = {f"model.{n.replace('.mlp.', '._orig_mod.mlp.')}": p for n, p in own.items()}
    return weights | {f"optim.state.{name}.exp_avg": p + 1 for name, p in own.items()}


@pytest.mark.parametrize("kind, world", zip(KINDS, (1, 2, 3, 7)))
def test_the_chunks_of_all_ranks_are_joined(kind, world, tmp_path):
    model = saved(tmp_path / "base", **KINDS[kind])
    state = trained(model)
    source = write(tmp_path / "fsdp", state, world)
    convert.import_(Import(source=source, out=tmp_path / "got", like=tmp_path / "base/config.json"))
    got = load_model(tmp_path / "got")
    assert got.args == model.args and torch.equal(got(TOKENS), model(TOKENS))
    theirs = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(theirs, checkpoint_id=source, no_dist=True)  # torch reads these files, too
    assert all(torch.equal(theirs[name], tensor) for name, tensor in state.items())


def test_names_of_meta_as_in_torchtitan_and_the_directory_of_a_trainer(tmp_path):
    model = saved(tmp_path / "base", torch.bfloat16, n_kv_heads=2, tie_embeddings=False)
    extra = {"freqs_cis": torch.zeros(64, 4), "optimizer.layers.0.attention.wq.weight": torch.zeros(3)}
    source = write(tmp_path / "checkpoint-7" / "pytorch_model_fsdp_0", meta_state(model) | extra, 2).parent
    with pytest.raises(ValueError, match="with Meta's names, does not say everything about its model: add --max"):
        convert.import_(Import(source=source, out=tmp_path / "got"))
    flags = {"n_heads": 4, "max_seq_len": 64, "norm_eps": 1e-5, "rope_theta": 10000.0}
    convert.import_(Import(source=source, out=tmp_path / "got", **flags))
    got = load_model(tmp_path / "got", dtype=torch.bfloat16)
    assert got.args == model.args and torch.equal(got(TOKENS), model(TOKENS))


def test_files_that_are_missing_or_damaged_are_refused(tmp_path):
    source = write(tmp_path / "fsdp", trained(saved(tmp_path / "base")), 2)

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            convert.import_(Import(source=source, out=tmp_path / "got", like=tmp_path / "base"))
        assert not (tmp_path / "got").exists()

    last, metadata = source / "__1_0.distcp", source / ".metadata"
    whole, described = last.read_bytes(), metadata.read_bytes()
    last.unlink()
    refused(r"__1_0\.distcp is missing: copy the whole checkpoint")
    last.write_bytes(whole[: len(whole) // 3])  # the rest is the optimizer's
    refused(r"__1_0\.distcp is truncated: it has")
    last.write_bytes(bytes(len(whole)))
    refused(r"__1_0\.distcp is damaged at byte")
    last.write_bytes(whole)
    metadata.write_bytes(described[: len(described) // 2])
    refused(r"\.metadata is (refused|truncated)")
    metadata.write_bytes(pickle.dumps([1]))
    refused("is no metadata of torch.distributed.checkpoint")
    less = pickle.loads(described)
    less.state_dict_metadata["model.model.norm.weight"].chunks.pop()
    less.storage_data = {
        i: p for i, p in less.storage_data.items() if (i.fqn, i.index) != ("model.model.norm.weight", 1)
    }
    metadata.write_bytes(pickle.dumps(less))
    refused(r"the chunks of model\.model\.norm\.weight do not make up its shape \(32,\)")


def test_metadata_that_wants_to_execute_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (tmp_path / "it_ran",)

    source = write(tmp_path / "fsdp", trained(saved(tmp_path / "base")), 1)
    (source / ".metadata").write_bytes(pickle.dumps(Metadata({}, Evil(), None)))
    with pytest.raises(ValueError, match=r"is refused: .* of which nothing was run"):
        convert.import_(Import(source=source, out=tmp_path / "got"))
    assert not (tmp_path / "it_ran").exists()


def test_a_chunk_that_wants_to_execute_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it_ran"),)

    source = write(tmp_path / "fsdp", trained(saved(tmp_path / "base")), 1)
    file = source / "__0_0.distcp"
    torch.save(Evil(), tmp_path / "evil.pt")
    evil, whole = (tmp_path / "evil.pt").read_bytes(), file.read_bytes()
    described = pickle.loads((source / ".metadata").read_bytes())
    for info in described.storage_data.values():  # every chunk is the evil one
        info.offset, info.length = 0, len(evil)
    file.write_bytes(evil + whole[len(evil) :])
    (source / ".metadata").write_bytes(pickle.dumps(described))
    with pytest.raises(ValueError, match=r"distcp is refused: at byte 0 is a pickle that asks for \S+, and nothing"):
        convert.import_(Import(source=source, out=tmp_path / "got", like=tmp_path / "base"))
    assert not (tmp_path / "it_ran").exists() and not (tmp_path / "got").exists()
