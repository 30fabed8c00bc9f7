"""What a solver has to know of a linear layer's inputs, summed over calibration tokens batch by batch."""

from __future__ import annotations

import torch

SAMPLE = 1024  # inputs that are kept as they are


class InputStatistics:
    """Second moments of a layer's inputs, in memory that does not grow with the number of tokens.

    gram      (in, in) float32: 2/n sum of x xᵀ, the Hessian of the squared error of the layer's output
    cross     (in, in) float32: 2/n sum of (x_full - x) xᵀ, of the inputs x_full that the unquantized model has there,
              or None where they were not given
    sample    (n, in) float32: some of the inputs, at most SAMPLE, spread over the whole text
    """

    def __init__(self, n_inputs: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.n_tokens = 0
        self.gram = torch.zeros(n_inputs, n_inputs, device=device, dtype=dtype)
        self.sample = torch.zeros(0, n_inputs, device=device, dtype=dtype)
        self.cross: torch.Tensor | None = None

    @torch.no_grad()
    def add(self, x: torch.Tensor, x_full: torch.Tensor | None = None) -> None:
        """Count inputs (..., in); `x_full`: the unquantized model's inputs at the same places.

        Raises ValueError where an input is not finite.
        """
        x = x.reshape(-1, x.shape[-1]).to(self.gram)  # (n, in)
        if not x.isfinite().all():
            raise ValueError(
                "the inputs are not finite on the calibration text: the activations overflow, or the model has diverged"
            )
        # Running means: the old sums are scaled down, so that nothing overflows however many tokens come.
        keep = self.n_tokens / (self.n_tokens + len(x))
        self.n_tokens += len(x)
        self.gram.mul_(keep).addmm_(x.T, x, alpha=2 / self.n_tokens)
        self.sample = torch.cat([self.sample, x[:: max(1, len(x) // 128)]])
        while len(self.sample) > SAMPLE:
            self.sample = self.sample[::2]
        if x_full is not None:
            if self.cross is None:
                self.cross = torch.zeros_like(self.gram)
            difference = x_full.reshape(-1, x_full.shape[-1]).to(self.gram) - x  # (n, in)
            self.cross.mul_(keep).addmm_(difference.T, x, alpha=2 / self.n_tokens)
