"""The callback `mlm_probability_schedule`: mask less, or more, as the training goes on."""

from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.optim import LinearScheduler
from llmfoundry.data.text_data import ConcatenatedSequenceCollatorWrapper

from m2_plugin.foundry.mlm_text import DRAWS, MLMCollator, threshold
from m2_plugin.models.modeling_m2_bert import IGNORE_INDEX

__all__ = ["MLMProbabilitySchedule"]


class MLMProbabilitySchedule(Callback):
    """Change the share of masked tokens linearly with time (Yang et al., arXiv 2212.10806).

    The loader masks with the larger of the two probabilities. This callback gives some positions
    their token back: those whose random draw is not below the present probability. So a batch has
    the masks that the loader would give it with that probability. They depend on the batch's number
    and content only: a resumed run has the masks of an unbroken one. Evaluation does not change.

    Each batch logs `mlm_probability`.

    Args:
        start: The probability at the start of the run.
        end: The probability at the end. The larger of the two must be
            `train_loader.dataset.mlm_probability`.
        t_max: When `end` is reached; in Composer's times, such as `0.5dur`.

    Raises:
        ValueError: If a probability is not strictly between 0 and 1; at the start of the run, if
            the training loader is not `mlm_text` or masks with another probability.
    """

    def __init__(self, start: float, end: float, t_max: str = "1dur"):
        for key, value in (("start", start), ("end", end)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise ValueError(
                    f"mlm_probability_schedule.{key} must be a number strictly between 0 and 1, "
                    f"got {value!r}."
                )
        self.largest = max(start, end)
        self.probability = LinearScheduler(alpha_i=start, alpha_f=end, t_max=t_max)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Ask the loader for its draws, before its workers start."""
        del logger
        collator = getattr(state.train_dataloader, "collate_fn", None)
        if isinstance(collator, ConcatenatedSequenceCollatorWrapper):
            collator = collator.base_collator
        if not isinstance(collator, MLMCollator):
            raise ValueError(
                "mlm_probability_schedule changes the masks of mlm_text: set train_loader.name to "
                "mlm_text, or leave the callback out."
            )
        if collator.mlm_probability != self.largest:
            raise ValueError(
                f"train_loader.dataset.mlm_probability is {collator.mlm_probability}, but must be "
                f"the larger value of mlm_probability_schedule, {self.largest}."
            )
        collator.give_draws = True

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Unmask the positions that the present probability does not choose."""
        probability = self.probability(state)
        unmask(state.batch, probability)
        logger.log_metrics({"mlm_probability": probability})


def unmask(batch: dict[str, Any], probability: float) -> None:
    """Change a batch of `MLMCollator` in place to one of a probability that is not larger.

    In place, since the tensors may lie in pinned memory.

    Args:
        batch: A batch with `mask_draws`, which are taken out.
        probability: The probability.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    given_back = (labels != IGNORE_INDEX) & (batch.pop(DRAWS) >= threshold(probability) // 2)
    ids.copy_(torch.where(given_back, labels, ids))
    labels.masked_fill_(given_back, IGNORE_INDEX)
    batch["loss_generating_tokens"] = (labels != IGNORE_INDEX).sum(1).tolist()
