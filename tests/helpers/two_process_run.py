"""What test_distributed.py starts under torchrun: `two_process_run.py FOLDER MODE`, a toy run in FOLDER/MODE.

plain: nothing happens; the number of gradient exchanges goes to FOLDER/exchanges, what is left of a buffer that each
       process has set to its rank to FOLDER/mark0 and mark1
ask:   rank 1 alone gets a SIGTERM in step 6, and again for each of its micro-batches
fail:  rank 0 alone cannot write its second checkpoint
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from helpers.tiny_training_run import toy_data, toy_trainer
from optim.args import OptimArgs

# an epsilon this large keeps AdamW from blowing up the last bit of small gradients
OPTIM = OptimArgs(optimizer="adamw", lr=0.01, eps=0.01, warmup_steps=3)
RUN = {"max_steps": 20, "micro_batch_size": 2, "save_interval": 4, "keep": 20}


def main(folder: Path, mode: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = toy_data(folder / f"data{os.environ['RANK']}", batch_size=12)  # each writes its own copy of the same
    ours = toy_trainer(folder / mode, data, OPTIM, backend="ddp", eval_data=data, **RUN)
    with ours.backend as backend:
        if mode == "plain":
            exchanges = []
            wrap = backend.wrap

            def counted(model, optimizer):
                model.register_buffer("mark", torch.zeros(()), persistent=False)
                wrapped = wrap(model, optimizer)
                model.mark.fill_(backend.rank)
                wrapped.register_comm_hook(None, lambda _, bucket: exchanges.append(1) or allreduce_hook(None, bucket))
                return wrapped

            backend.wrap = counted
            ours.fit()
            (folder / f"mark{backend.rank}").write_text(str(ours.model.mark.item()))
            if backend.main:
                (folder / "exchanges").write_text(str(len(exchanges)))
        elif mode == "ask":

            def ask(*_):
                if backend.rank == 1 and ours.state.step == 5:
                    os.kill(os.getpid(), signal.SIGTERM)

            ours.model.model.layers[0].register_forward_hook(ask)
            ours.fit()
        elif mode == "fail":
            save = ours.checkpoints.write

            def fail(directory):
                if ours.state.step == 8:
                    raise OSError("no space left")
                save(directory)

            ours.checkpoints.write = fail
            ours.fit()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
