"""Block by block: what each layer is quantized on, by running the whole model by hand."""

import copy

import pytest
import torch
from helpers.small_model import small_model

from quant.calibrate import STAGES, Stream, quantize_block
from quant.gptq import GPTQOptions, solve, solve_nearest
from quant.grid import GridOptions
from quant.grouped import GroupedLinear

GRID = GridOptions(4, 8)


def run_blocks(model, tokens: torch.Tensor):
    """The context of a forward pass, and what runs one block in it."""
    context = model.context_for_rows(tokens)
    return lambda block, hidden, _: block(hidden, *context, None)


@pytest.mark.parametrize("propagation", [0.0, 0.5])
def test_each_layer_sees_what_the_quantized_ones_below_it_put_out(propagation):
    model = small_model().float()
    reference = copy.deepcopy(model)
    batches = [torch.randint(61, (2, 9)), torch.randint(61, (3, 9))]
    call = run_blocks(model, batches[0])
    hidden = [model.model.embed_tokens(tokens).detach() for tokens in batches]
    stream = Stream(call, hidden, [h.clone() for h in hidden] if propagation else None)
    options = GPTQOptions(GRID, propagation=propagation)
    seen = {}

    def solve_and_note(name, layer, statistics):
        seen[name] = statistics
        quantized, report = solve(layer.weight.detach(), statistics, options)
        return GroupedLinear(layer, quantized, 4), report

    names = []
    for n, block in enumerate(model.model.layers):
        names += [name for name, _ in quantize_block(block, stream, solve_and_note, f"model.layers.{n}.")]
    assert names == [f"model.layers.{n}.{name}" for n in range(2) for stage in STAGES for name in stage]
    # By hand: the finished model, in which only the layers that came later are put back.
    for name, statistics in seen.items():
        partly = copy.deepcopy(reference)
        stage = next(stage for stage in STAGES if name.split(".", 3)[3] in stage)
        before = names[
            : names.index(name.rsplit(".", 2)[0] + "." + stage[0].split(".", 1)[0] + "." + stage[0].split(".")[1])
        ]
        for done in before:
            parent, _, leaf = done.rpartition(".")
            setattr(partly.get_submodule(parent), leaf, model.get_submodule(done))
        inputs, full = record(partly, name, batches), record(reference, name, batches)
        torch.testing.assert_close(statistics.gram, 2 / len(inputs) * inputs.T @ inputs, atol=1e-4, rtol=1e-4)
        if propagation:
            torch.testing.assert_close(
                statistics.cross, 2 / len(inputs) * (full - inputs).T @ inputs, atol=1e-4, rtol=1e-4
            )
    for tokens, out in zip(batches, stream.hidden):
        torch.testing.assert_close(model.model.norm(out), model.hidden(tokens), atol=1e-5, rtol=1e-5)


def record(model, name: str, batches) -> torch.Tensor:
    """What goes into a layer over all batches, (tokens, in)."""
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    for tokens in batches:
        with torch.no_grad():
            model(tokens)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])


def test_a_quantized_model_computes_what_its_codes_say():
    model = small_model().float()
    dense = copy.deepcopy(model)
    stream = Stream(
        run_blocks(model, torch.zeros(1, 7, dtype=torch.long)), [model.model.embed_tokens(torch.randint(61, (2, 7)))]
    )

    def nearest(name, layer, _):
        return GroupedLinear(layer, solve_nearest(layer.weight.detach(), GRID), 4), {}

    for block in model.model.layers:
        list(quantize_block(block, stream, nearest))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, GroupedLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        dense.get_submodule(name).weight.data = layer.dequantize()
    tokens = torch.randint(61, (2, 12))
    torch.testing.assert_close(model(tokens), dense(tokens))
