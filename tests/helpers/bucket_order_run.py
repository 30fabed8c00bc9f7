"""One of four processes: gradients of the same batch under DDP, three times, and the sum in the order of the ranks.

python -m torch.distributed.run --standalone --nproc_per_node 4 bucket_order_run.py      prints what rank 0 found
"""

import json

import torch
import torch.distributed as dist
from torch import nn

from distributed.ddp import DataParallel


def main() -> None:
    torch.manual_seed(0)
    with DataParallel(torch.device("cpu"), fp16=False) as backend:
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)])
        wrapped = backend.wrap(model, None)
        torch.manual_seed(backend.rank)
        rows, found = torch.randn(32, 64), []
        for _ in range(3):  # after the first time DDP fills its buckets anew
            model.zero_grad(set_to_none=False)
            wrapped(rows).pow(2).sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
        model(rows).pow(2).sum().backward()  # of this rank alone
        in_order = []
        for parameter in model.parameters():
            parts = [torch.empty_like(parameter) for _ in range(backend.world)]
            dist.all_gather(parts, parameter.grad)
            in_order.append((parts[0] + parts[1] + parts[2] + parts[3]) / 4)
        if backend.rank == 0:
            print(json.dumps([all(map(torch.equal, in_order, each)) for each in found]))


if __name__ == "__main__":
    main()
