"""Rows of the table of oracles: quantization. Each function returns its largest error."""

from __future__ import annotations

import torch
from helpers.oracle_row import apart, differing, room, row


@row("4-bit weights (nf4, fp4)", "the paper's definition, bit for bit", "5 shapes, blocks that rows cut, 3 sizes", 0)
def four_bits() -> float:
    rooms, worst = room("test_quant_linear"), 0.0
    reference = rooms.reference
    for kind in ("nf4", "fp4"):
        for shape, size in zip([(64, 8), (65, 3), (1, 1), (150, 60), (7, 33)], [1e-6, 0.02, 3.0, 0.02, 1e-6]):
            layer = torch.nn.Linear(*shape, bias=False)
            torch.nn.init.normal_(layer.weight, std=size)
            levels = reference.LEVELS[kind]
            expected = reference.undo(*reference.blockwise(layer.weight.detach(), levels, 64), levels, 64)
            found = rooms.quantized(layer, kind, double=False).dequantize()
            worst = max(worst, (found - expected.view_as(layer.weight)).abs().max().item())
    return worst


@row("4-bit layers: products", "bitsandbytes, fp32", "nf4 and fp4, 128 to 80", 1e-5)
def four_bit_products() -> float:
    import bitsandbytes as bnb

    rooms, worst = room("test_quant_linear"), 0.0
    for kind in ("nf4", "fp4"):
        layer, x = torch.nn.Linear(128, 80), torch.randn(4, 5, 128)
        theirs = bnb.nn.Linear4bit(128, 80, quant_type=kind, compute_dtype=torch.float32)
        theirs.load_state_dict(layer.state_dict())
        with torch.no_grad():
            worst = max(worst, apart(rooms.quantized(layer, kind)(x), theirs.to("cpu")(x)))
    return worst


@row("GPTQ: codes that differ", "least squares after every column, fp64", "8 settings, 3 shapes, ragged groups", 0)
def gptq() -> float:
    rooms, pairs = room("test_quant_gptq"), []
    for options in rooms.OPTIONS.values():
        for shape in ((5, 24), (1, 7), (9, 33)):
            weight, x = rooms.some_weight(*shape), rooms.correlated(80, shape[1])
            found, _ = rooms.solve(weight, rooms.statistics_of(x), options)
            pairs += zip(found.codes.flatten().tolist(), rooms.by_least_squares(weight, x, options).flatten().tolist())
    return differing(pairs)


@row("AWQ: folded scales, logits", "the model before, fp64", "4 folds, 4 shapes of heads, both layers", 1e-11)
def awq_folds() -> float:
    rooms, worst = room("test_quant_awq"), 0.0
    for shape in ({}, {"n_kv_heads": 4}, {"n_kv_heads": 1}, {"attention_bias": True, "head_dim": 6}):
        model, tokens = rooms.small_model(**shape), torch.randint(61, (2, 11))
        with torch.no_grad():
            before = model(tokens)
            for layer in range(2):
                for fold in rooms.folds(model, layer).values():
                    rooms.apply_scale(fold, torch.rand(len(fold.before.weight), dtype=torch.float64) * 5 + 0.05)
            worst = max(worst, apart(model(tokens), before))
    return worst


@row("quantized files: weights", "compressed-tensors' reader, fp32", "2, 3, 4, 8 bits; with and without zero points", 0)
def quantized_files() -> float:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    rooms, worst = room("test_quant_layouts"), 0.0
    for bits in (2, 3, 4, 8):
        for symmetric in (False, True):
            quantized = rooms.some_layer((40, 96), bits, 32, symmetric)
            tensors = rooms.LAYOUTS["compressed-tensors"].write(quantized, bits)
            if symmetric:
                del tensors["weight_zero_point"]
            args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=32)
            scheme = QuantizationScheme(targets=["Linear"], weights=args)
            theirs = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"].float()
            worst = max(worst, (theirs - quantized.dequantize()).abs().max().item())
    return worst


@row("LLM.int8(): products", "bitsandbytes' Linear8bitLt, fp32", "3 shapes; with outliers and without", 0)
def llm_int8() -> float:
    import bitsandbytes as bnb

    rooms, worst = room("test_quant_readers"), 0.0
    for tokens, n_inputs, n_outputs in ((9, 64, 48), (1, 40, 7), (33, 1000, 24)):
        for threshold in (0.0, 6.0):
            layer, x = torch.nn.Linear(n_inputs, n_outputs, bias=False), torch.randn(tokens, n_inputs)
            x[0, 11] = 100000.0 if threshold else 30.0
            theirs = bnb.nn.Linear8bitLt(n_inputs, n_outputs, bias=False, has_fp16_weights=False, threshold=threshold)
            theirs.load_state_dict(layer.state_dict())
            with torch.no_grad():
                worst = max(worst, apart(rooms.LLMInt8Linear(layer, threshold)(x), theirs.to("cpu").eval()(x)))
    return worst


@row("SmoothQuant: folded scales, logits", "the model before, fp64", "4 folds, alpha 0.5", 1e-11)
def smoothquant_folds() -> float:
    rooms, smooth, worst = room("test_quant_awq"), room("quant.smooth"), 0.0
    for name in ("attention", "values", "mlp", "down"):
        model, tokens = rooms.small_model(), torch.randint(61, (2, 11))
        before, fold = model(tokens), rooms.folds(model)[name]
        scale, _ = smooth.search_scale(fold, rooms.outliers(30, fold.after[0].in_features), lambda: None, alpha=0.5)
        rooms.apply_scale(fold, scale)
        worst = max(worst, apart(model(tokens), before))
    return worst


@row("inputs in 8 bits: codes that differ", "compressed-tensors, fp32", "36 tokens of 40", 0)
def inputs_in_8_bits() -> float:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = torch.randn(36, 1, 40) * 5
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    theirs = quantize(x, *compute_dynamic_scales_and_zp(x, args, None), args)
    codes, _ = room("quant.int8").round_inputs(x.flatten(0, 1))
    return differing(zip(codes.flatten().tolist(), theirs.flatten().tolist()))


@row("BitNet: weights, inputs, packing", "transformers.integrations.bitnet, fp32", "3 shapes, 7 scales of inputs", 0)
def bitnet() -> float:
    theirs, ours, worst = room("transformers.integrations.bitnet"), room("quant.bitnet"), 0.0
    with torch.compiler.set_stance("force_eager"):
        for shape in ((8, 5), (4, 64), (12, 1)):
            weight, x = torch.randn(shape) * 0.3, torch.randn(7, shape[1]) * torch.logspace(-7, 2, 7)[:, None]
            codes, scale = ours.round_weight(weight, "b158")
            worst = max(worst, (codes / scale - theirs.WeightQuant.apply(weight)).abs().max().item())
            worst = max(worst, (ours.round_inputs(x) - theirs.ActQuant.apply(x)).abs().max().item())
            packed = ours.pack_ternary(codes).int() - theirs.pack_weights(codes.clone()).int()
            worst = max(worst, packed.abs().max().item())
    return worst
