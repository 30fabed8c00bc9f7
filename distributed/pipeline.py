"""Pipeline parallel: each process has some layers of a model, and hands activations on to the next.

GPipe (Huang et al. 2018, arXiv:1811.06965) runs all micro-batches forward and then all backward; 1F1B (Narayanan et al.
2019, PipeDream) goes back as soon as it can, so that a stage keeps at most as many activations as there are stages. The
schedules are those of torch.distributed.pipelining. They would average over micro-batches: here each loss is a sum that
is divided by the number of targets of the whole step, so that rows of unequal lengths count by their tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from distributed.split import layers_of
from distributed.tensor_parallel import loss_of
from loss import IGNORE

SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
Output = tuple[torch.Tensor, torch.Tensor]


class Received(nn.Module):
    """What a stage behind the first has in place of the embedding: it gives what the stage before has sent."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the activations; tokens: those that they are of."""
        return self.activations


class Part:
    """What stage `stage` of `n_stages` has of a `Transformer`: the modules that it needs stay in the model.

    The others are kept aside, with parameters that have a shape and no memory, for `whole`.
    """

    def __init__(self, model: Any, stage: int, n_stages: int) -> None:
        decoder, self.model = model.model, model
        self.first, self.last = stage == 0, stage == n_stages - 1
        self.tied = model.lm_head.weight is decoder.embed_tokens.weight
        places = [(decoder, "embed_tokens"), (decoder, "layers"), (decoder, "norm"), (model, "lm_head")]
        self.all = [(module, name, getattr(module, name)) for module, name in places]
        layers = nn.ModuleList()
        for number in layers_of(len(decoder.layers), n_stages)[stage]:
            layers.add_module(str(number), decoder.layers[number])  # under its number in the whole model
        own = [
            decoder.embed_tokens if self.first else Received(),
            layers,
            decoder.norm if self.last else nn.Identity(),
            model.lm_head if self.last else None,
        ]
        self.own = [(module, name, kept) for (module, name), kept in zip(places, own)]
        forget(model, {p for module in own if module is not None for p in module.parameters()})
        self._put(self.own)

    def tie(self) -> None:
        """Tie head and embedding of the whole model again, after one of them, or both, got a new parameter."""
        if self.tied:
            with self.whole():
                embedding, head = self.model.model.embed_tokens, self.model.lm_head
                if self.first:
                    head.weight = embedding.weight
                else:
                    embedding.weight = head.weight

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block the model has all modules, under their names; parameters of other stages are on "meta"."""
        self._put(self.all)
        try:
            yield
        finally:
            self._put(self.own)

    def forward(
        self,
        x: torch.Tensor,
        *,
        tokens: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        token_losses: bool = False,
        **context: torch.Tensor,
    ) -> torch.Tensor | Output:
        """Return the activations of this stage, of the last one the loss and one tensor more as the whole model does.

        x: tokens (B, T) on the first stage, on the others activations; `tokens` are needed there only.
        """
        if not self.first:
            self.model.model.embed_tokens.activations = x
        hidden = self.model.hidden(x if self.first else tokens, **context)
        return loss_of(self.model, hidden, targets, loss_weights, token_losses) if self.last else hidden

    @staticmethod
    def _put(children: Sequence[tuple[nn.Module, str, nn.Module | None]]) -> None:
        for module, name, child in children:
            setattr(module, name, child)


def forget(model: nn.Module, kept: set[nn.Parameter]) -> None:
    """Let all parameters but `kept` have a shape only; one with two names stays one."""
    empty: dict[nn.Parameter, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, p in module._parameters.items():
            if p is not None and p not in kept:
                empty.setdefault(p, nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad))
                module._parameters[name] = empty[p]


class Pipeline:
    """The passes of one stage, in step with the other stages in `group`, in which its rank is its number.

    tp: processes that divide the tokens of activations between the blocks.
    """

    def __init__(self, part: Part, group: dist.ProcessGroup, device: torch.device, schedule: str, tp: int) -> None:
        self.model, self.part, self.group, self.device, self.tp = part.model, part, group, device, tp
        self.stage, self.n_stages = group.rank(), group.size()
        self.schedule = SCHEDULES[schedule]
        self.scale = 0.0  # of the losses of the present step
        self.outputs: list[Output] = []  # of its micro-batches, on the last stage
        self._schedules: dict[tuple[int, ...], Any] = {}  # for each shape of a step

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor, **inputs: Any) -> Output:
        """Return what the whole model does for one micro-batch, on all stages."""
        inputs |= {"tokens": tokens, "targets": targets}
        args, more = self._inputs(inputs)
        if not args:
            x = torch.empty(self._shape(*tokens.shape), dtype=self.model.activation_dtype, device=tokens.device)
            dist.recv(x, group=self.group, group_src=self.stage - 1)
            args = (x,)
        out = self.model(*args, **more)
        if not self.part.last:
            dist.send(out.contiguous(), group=self.group, group_dst=self.stage + 1)
        return self._shared([out] if self.part.last else [], [inputs])[0]

    def step(self, micro_batches: Sequence[dict[str, Any]], scale: float) -> list[Output]:
        """Run all micro-batches forward and backward; gradients are those of their summed losses times `scale`.

        Return what the whole model does for each of them, on all stages. The last one may have fewer rows.
        """
        n_micro, (rows, width) = len(micro_batches), micro_batches[0]["tokens"].shape
        padded = [filled(micro, rows) for micro in micro_batches]  # all stages expect one shape
        inputs = {
            name: torch.cat([micro[name] for micro in padded]) if torch.is_tensor(value) else value
            for name, value in padded[0].items()
        }
        key = (n_micro, rows, width)
        if key not in self._schedules:
            self._schedules[key] = self._make(*key)
        self.scale, self.outputs = scale, []
        args, more = self._inputs(inputs)
        # the loss has its targets already: the schedule only needs something to divide
        target = {"target": inputs["tokens"]} if self.part.last else {}
        self._schedules[key].step(*args, **target, return_outputs=False, **more)
        return self._shared(self.outputs, micro_batches)

    def _inputs(self, inputs: dict[str, Any]) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """Return what this stage takes of the inputs of a model: its first argument, and those with a name."""
        names = {"positions", "doc_ids"} | (set() if self.part.first else {"tokens"})
        names |= {"targets", "loss_weights", "token_losses"} if self.part.last else set()
        more = {name: inputs[name] for name in names if inputs.get(name) is not None}
        return (inputs["tokens"],) if self.part.first else (), more

    def _shape(self, rows: int, width: int) -> tuple[int, int, int]:
        """Return the shape of activations between stages."""
        return rows, width // self.tp, self.model.args.dim

    def _make(self, n_micro: int, rows: int, width: int) -> Any:
        """Return a schedule for steps of this shape."""
        x = torch.empty(self._shape(rows, width), dtype=self.model.activation_dtype, device="meta", requires_grad=True)
        tokens, loss = torch.empty(rows, width, dtype=torch.int64, device="meta"), torch.empty((), device="meta")
        ends = {"input_args": tokens if self.part.first else x, "output_args": (loss, loss) if self.part.last else x}
        stage = PipelineStage(self.model, self.stage, self.n_stages, self.device, **ends, group=self.group)
        return self.schedule(stage, n_micro, loss_fn=self._loss, scale_grads=False)

    def _loss(self, output: Output, _: torch.Tensor) -> torch.Tensor:
        self.outputs.append((output[0].detach(), output[1].detach()))
        return output[0] * self.scale

    def _shared(self, outputs: Sequence[Output], micro_batches: Sequence[dict[str, Any]]) -> list[Output]:
        """Return the outputs of the last stage on all stages, without the rows that `filled` has added."""
        shapes = [tuple(micro["tokens"].shape) if micro.get("token_losses") else () for micro in micro_batches]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        device = micro_batches[0]["tokens"].device
        # one message: for each micro-batch its loss, then what goes with it; float64 keeps float32 exact
        flat = torch.empty(sum(sizes) + len(sizes), dtype=torch.float64, device=device)
        if self.part.last:
            both = ((loss.reshape(1), more.reshape(-1)[:size]) for (loss, more), size in zip(outputs, sizes))
            flat = torch.cat([x.to(torch.float64) for pair in both for x in pair])
        dist.broadcast(flat, group=self.group, group_src=self.n_stages - 1)
        parts = flat.split([size for each in sizes for size in (1, each)])  # loss, more, loss, more, ...
        return [(loss[0], more.view(shape)) for loss, more, shape in zip(parts[::2], parts[1::2], shapes)]


def filled(micro: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return a micro-batch of `rows` rows: the first one again and again, without targets, behind its own."""
    missing = rows - len(micro["tokens"])
    if not missing:
        return micro
    # expand makes no copies: (1, T) -> (missing, T)
    more = {name: x[:1].expand(missing, -1) for name, x in micro.items() if torch.is_tensor(x)}
    more["targets"] = torch.full_like(more["targets"], IGNORE)
    return {name: torch.cat([x, more[name]]) if name in more else x for name, x in micro.items()}
