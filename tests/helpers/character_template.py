"""A chat template one can read the ids of: a character is an id, and the kind of text can be told from it."""

from collections import Counter

from chat.samples import Samples
from dataset import IGNORE, Batch
from dataset_sft import SFTData

BOS, ROLE_ID, END = 1, {"system": 4, "user": 5, "assistant": 6}, 7
ANSWER = 5000  # the stand-in template writes answers with ids from here on, everything else below


class CharTemplate:
    """<s>, then <|role|> characters <|end|> for each message; the kind of text can be told from the id."""

    def encode(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        ids, mask = [BOS], [False]
        for message in messages:
            trained = message["role"] == "assistant" and message.get("loss", True)
            content = [ord(c) % 1000 + (ANSWER if trained else 100) for c in message["content"]]
            ids += [ROLE_ID[message["role"]], *content, END]
            mask += [False] + [trained] * (len(content) + 1)
        return ids, mask


def exchange(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def targets_in_context(samples: Samples) -> Counter:
    """(ids before it in its sample, target) of every trained id: what a loss over the samples one by one sees."""
    pairs = Counter()
    for start, stop in zip(samples.offsets[:-1].tolist(), samples.offsets[1:].tolist()):
        ids = samples.ids[start:stop].tolist()
        pairs.update((tuple(ids[:t]), ids[t]) for t in range(1, len(ids)) if samples.mask[start + t])
    return pairs


def targets_in_rows(batch: Batch) -> Counter:
    """The same of a batch, with the context that positions and doc_ids leave to each target."""
    pairs = Counter()
    for row in range(len(batch)):
        tokens, targets = batch.tokens[row].tolist(), batch.targets[row].tolist()
        docs = batch.doc_ids[row].tolist() if batch.doc_ids is not None else [0] * len(tokens)
        positions = batch.positions[row].tolist() if batch.positions is not None else list(range(len(tokens)))
        for t, target in enumerate(targets):
            if target != IGNORE:
                seen = [s for s in range(t + 1) if docs[s] == docs[t]]
                assert [positions[s] for s in seen] == list(range(len(seen))) and docs[t] >= 0
                pairs[tuple(tokens[s] for s in seen), target] += 1
    return pairs


def epoch_targets(data: SFTData, epoch: int = 0, world: int = 1) -> Counter:
    steps = range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch)
    return sum((targets_in_rows(data.batch(step, rank, world)) for step in steps for rank in range(world)), Counter())
