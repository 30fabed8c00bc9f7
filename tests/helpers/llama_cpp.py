"""llama.cpp itself, an oracle of GGUF: its server in this process, where the package xllamacpp is installed."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

xllamacpp = pytest.importorskip("xllamacpp", reason="pip install xllamacpp to run llama.cpp")


class LlamaCpp:
    """A GGUF file that llama.cpp has loaded, with float32 keys and values; lora: an adapter in GGUF."""

    def __init__(self, file: Path, lora: Path | None = None) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.endpoint_props = True
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self.server = xllamacpp.Server(params)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Return the server's answer."""
        request = urllib.request.Request(
            f"{self.server.listening_address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def log_probs(self, ids: Sequence[int], vocab_size: int) -> torch.Tensor:
        """Return the logarithms of the probabilities (V,) of what follows some ids."""
        body = {"prompt": [int(i) for i in ids], "n_predict": 1, "n_probs": vocab_size, "temperature": 0.0}
        # It answers a whole character, and not before: the probabilities are those of before this bias.
        body["logit_bias"] = [[self.encode("a")[-1], 1000.0]]
        found = self.post("completion", body)["completion_probabilities"][0]["top_logprobs"]
        row = torch.full((vocab_size,), float("nan"), dtype=torch.float64)
        for each in found:
            row[each["id"]] = each["logprob"]
        return row

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Return the ids of plain text; add_special: with what stands before every text."""
        return self.post("tokenize", {"content": text, "add_special": add_special, "parse_special": False})["tokens"]
