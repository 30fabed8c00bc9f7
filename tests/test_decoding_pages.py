"""Weights in huge pages: the same objects and numbers at other addresses."""

import mmap
from itertools import pairwise

import pytest
import torch
from torch import nn

from decoding import pages
from decoding.pages import in_huge_pages
from model import Transformer
from model_args import ModelArgs

LARGE = ModelArgs(dim=256, n_layers=2, n_heads=4, vocab_size=5000)  # more than a huge page in both dtypes

needs_huge_pages = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages are asked for on Linux")


@needs_huge_pages
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moves_parameters_and_keeps_objects_and_numbers(dtype):
    model = Transformer(LARGE).to(dtype).eval()
    model.register_buffer("number", torch.tensor(3.5))
    model.strided = nn.Parameter(torch.rand(2000, 600).t())
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    there = model.strided.data_ptr()
    in_huge_pages(model)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    addresses = sorted((p.data_ptr(), p.nbytes) for p in model.parameters() if p is not model.strided)
    assert all(a + size <= b for (a, size), (b, _) in pairwise(addresses)), "tensors overlap"
    assert all(address % 64 == 0 for address, _ in addresses)
    assert addresses[-1][0] - addresses[0][0] < sum(size + 64 for _, size in addresses), "not side by side"
    assert addresses[0][0] % pages.PAGE == 0
    assert model.number == 3.5
    assert model.strided.data_ptr() == there, "what is not contiguous stays"


@needs_huge_pages
def test_a_tied_head_stays_tied():
    model = Transformer(LARGE.replace(tie_embeddings=True)).eval()
    in_huge_pages(model)
    assert model.lm_head.weight is model.embedding.weight
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(ids)
        model.embedding.weight[1:4] *= 2  # a change in place is seen
        assert not torch.equal(model(ids), before)


def test_views_share_their_memory_still():
    whole = torch.rand(2000, 600)
    module = nn.Module()
    module.first, module.second = nn.Parameter(whole[:1000]), nn.Parameter(whole[1000:])
    in_huge_pages(module)
    whole[0, 0] = 7.0
    assert module.first[0, 0] == 7.0


@pytest.mark.parametrize("missing", ["no advice", "a kernel without them", "a small module"])
def test_leaves_all_as_it_is_where_there_are_none(missing, monkeypatch):
    model = nn.Linear(8, 8) if missing == "a small module" else nn.Linear(2000, 600)
    if missing == "no advice":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    elif missing == "a kernel without them":
        monkeypatch.setattr(pages.mmap, "MADV_HUGEPAGE", -1, raising=False)
    at = model.weight.data_ptr()
    in_huge_pages(model)
    assert model.weight.data_ptr() == at
