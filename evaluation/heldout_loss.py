"""Loss on held-out data: in nats per token and in bits per byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bins.token_bin import TokenBin
from chat.samples import read_samples
from cli.progress import say
from corpora.registry import BadRecord
from dataset import BatchSource, PretrainData
from dataset_sft import SFTData
from evaluation.task import Task
from files import write_json
from serving.assistant import Assistant
from training.heldout import evaluate


@dataclass
class HeldoutLoss(Task):
    """Loss on the tokens of a held-out bin and, for a model with a chat template, on the answers in held-out
    conversations."""

    heldout: Path
    sft_heldout: Path
    seq_len: int
    batch_size: int

    def run(self, assistant: Assistant) -> dict[str, dict[str, float]]:
        """Return the measures of each file by its stem. Raises FileNotFoundError where there is no file to measure."""
        sources = self.sources(assistant)
        if not sources:
            raise FileNotFoundError(
                f"neither {self.heldout} nor {self.sft_heldout} exists: name a file with --heldout or --sft_heldout"
            )
        measures = {}
        for path, source in sources.items():
            say(f"{path}: {source.steps_per_epoch} batches of {self.batch_size} x {source.seq_len} tokens ...")
            values = evaluate(assistant.model, source, assistant.tokenizer.token_bytes())
            print(f"{path}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items()))
            measures[path.stem] = values
        record(assistant.directory, measures)
        return measures

    def sources(self, assistant: Assistant) -> dict[Path, BatchSource]:
        """Return the batches of each file that exists and that this model can be measured on."""
        tokenizer, seq_len = assistant.tokenizer, min(self.seq_len, assistant.model.args.max_seq_len)
        sources: dict[Path, BatchSource] = {}
        if self.heldout.is_file():
            tokens = TokenBin(self.heldout)
            tokens.check(tokenizer.sha256(), tokenizer.vocab_size, tokenizer.begins)
            sources[self.heldout] = PretrainData([tokens], seq_len, self.batch_size, seed=0, shuffle=False)
        if assistant.template is not None and self.sft_heldout.is_file():
            broken: list[BadRecord] = []
            samples = read_samples(self.sft_heldout, assistant.template, seq_len, broken=broken)
            if broken:
                first = f"the first, {broken[0].where}: {broken[0].reason}"
                say(f"{self.sft_heldout}: records that cannot be read are left out: {len(broken)}; {first}")
            sources[self.sft_heldout] = SFTData(samples, seq_len, self.batch_size, seed=0, shuffle=False)
        return sources


def record(directory: Path | None, measures: dict[str, dict[str, float]]) -> None:
    """Write the measures beside the model, as MODEL.loss.json, for its report; say so where that cannot be done."""
    if directory is None:
        return
    path = directory.parent / f"{directory.name}.loss.json"
    try:
        write_json(path, {"task": "loss", "model_directory": str(directory.resolve()), "measures": measures})
    except OSError as error:
        say(f"{path} cannot be written, the numbers stand above: {error.strerror or error}")
