"""llama.cpp behind a pipe, for bench/llama_cpp.py: a JSON object a line in, one out.

It runs in an environment of its own, with the package llama-cpp-python, and imports nothing of this project.

{"load": FILE, "threads": 2}                     -> {"system": what the library was built for}
{"decode": FILE, "prompt": ids, "tokens": n}     -> {"moments": seconds, "ids": ids}: greedy, one token after another
{"loss": FILE, "ids": ids}                       -> {"loss": mean nats of ids 1.. after those before them}
"""

import json
import math
import sys
import time
from itertools import pairwise

import llama_cpp as lib
import numpy as np

CONTEXT = 1024  # tokens
opened = {}  # file -> model, context, size of the vocabulary


def load(path, threads):
    """Open a file; raise SystemExit where llama.cpp cannot."""
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot open {path}")
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = CONTEXT, threads, threads
    context = lib.llama_init_from_model(model, settings)
    opened[path] = model, context, lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    return {"system": lib.llama_print_system_info().decode()}


def feed(context, ids, size):
    """Return the logits (size,) after some more ids."""
    array = (lib.llama_token * len(ids))(*ids)
    if lib.llama_decode(context, lib.llama_batch_get_one(array, len(ids))):
        raise SystemExit("llama_decode failed")
    return np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (size,))


def decode(path, prompt, tokens):
    """Decode greedily, without an end."""
    _, context, size = opened[path]
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    moments, ids, run = [time.perf_counter()], [], prompt
    while len(ids) < tokens:
        ids.append(int(feed(context, run, size).argmax()))
        run = ids[-1:]
        moments.append(time.perf_counter())
    return {"moments": moments, "ids": ids}


def loss(path, ids):
    """Return the mean loss of all ids but the first."""
    _, context, size = opened[path]
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    total = 0.0
    for one, after in pairwise(ids):
        logits = feed(context, [one], size).astype(np.float64)
        total += math.log(np.exp(logits - logits.max()).sum()) + float(logits.max() - logits[after])
    return {"loss": total / (len(ids) - 1)}


for line in sys.stdin:
    request = json.loads(line)
    if "load" in request:
        answer = load(request["load"], request["threads"])
    elif "decode" in request:
        answer = decode(request["decode"], request["prompt"], request["tokens"])
    else:
        answer = loss(request["loss"], request["ids"])
    print(json.dumps(answer), flush=True)
