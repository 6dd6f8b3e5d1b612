"""Loss of a prediction: squared or pseudo-Huber errors, weighted by noise level."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from gen_accel.lora.config import TrainConfig
from gen_accel.lora.noising import Noising

LEAST = 1e-6  # sum of counts; below, as under a black mask, there is nothing to learn
OBJECTIVES = {"cosmap": "flow", "min_snr": "v"}  # what a model predicts, for each weighting


@dataclass(frozen=True)
class Loss:
    """Mean error of predictions.

    An error e counts as e^2, or with a width c of the pseudo-Huber loss as 2 c (sqrt(e^2 + c^2) -
    c), which is e^2 for small errors and 2 c |e| for large ones.

    Weightings of a noise level sigma:
        "cosmap": 2 / (pi (1 - 2 sigma + 2 sigma^2)) (Esser et al., 2024,
            https://arxiv.org/abs/2403.03206).
        "min_snr": min(snr, gamma) / (snr + 1) of v-prediction (Hang et al., 2023,
            https://arxiv.org/abs/2303.09556).

    Args:
        huber: c; None for squared errors.
        weighting: "none", "cosmap" or "min_snr".
        min_snr: gamma.
    """

    huber: float | None = None
    weighting: str = "none"
    min_snr: float = 5.0

    @classmethod
    def of(cls, config: TrainConfig) -> "Loss":
        return cls(config.huber, config.weighting, config.min_snr)

    def check(self, family: Any) -> None:
        """Refuse, by a ValueError, a weighting that is made for another prediction."""
        wanted = OBJECTIVES.get(self.weighting)
        if wanted is not None and wanted != family.PREDICTS:
            fits = [name for name, kind in OBJECTIVES.items() if kind == family.PREDICTS]
            raise ValueError(
                f"weighting {self.weighting} is for models that predict {wanted!r}, and "
                f"{family.MODELS} predicts {family.PREDICTS!r}: take {', '.join(fits)} or none"
            )

    def weights(self, sigma: Tensor, noising: Noising) -> Tensor | None:
        """Return the weights of noise levels, (B,); None where all are 1."""
        if self.weighting == "none":
            return None
        if self.weighting == "cosmap":
            return compute_loss_weighting_for_sd3("cosmap", sigma)
        # Written so that an infinite ratio, without any noise, gives 0.
        ratio = noising.snr(sigma)
        return ratio.clamp(max=self.min_snr) / (ratio + 1)

    def __call__(
        self,
        predicted: Tensor,
        target: Tensor,
        weights: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Compute the mean error.

        Args:
            predicted, target: (B, ...) float32.
            weights: of each sample, (B,).
            counts: how much each value counts in the mean, shaped like `predicted`.
        """
        if self.huber is None and weights is None and counts is None:
            return F.mse_loss(predicted, target)
        errors = (predicted - target).square()
        if self.huber is not None:
            # sqrt(e^2 + c^2) - c without the cancellation where e is small.
            errors = 2 * self.huber * errors / ((errors + self.huber**2).sqrt() + self.huber)
        if weights is not None:
            errors = errors * weights.view(-1, *(1,) * (errors.ndim - 1))
        if counts is None:
            return errors.mean()
        return (errors * counts).sum() / counts.sum().clamp_min(LEAST)
