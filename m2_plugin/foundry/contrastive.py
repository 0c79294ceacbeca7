"""Contrastive fine-tuning for retrieval: llm-foundry's contrastive model with M2-BERT inside.

    model:
      name: m2_bert_contrastive
      pretrained_model_name_or_path: ./runs/m2-bert-base/huggingface/final
      config_overrides: {classifier_pooling: mean, normalize_embeddings: true}
      loss: infonce                       # or orthogonal_projection
      contrastive_config: {temperature: 0.05}

The data comes from llm-foundry's `contrastive_pairs` dataloader; `data_prep/convert_pairs.py`
writes it. A batch is (B, P, L): each row has a query, its passage and P − 2 hard negatives.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import fields
from typing import Any

import torch
from llmfoundry.models.llm_embed.finetune_embedding_model import FinetuneEmbeddingModel
from torch import Tensor
from transformers import AutoModelForTextEncoding, PreTrainedTokenizerBase

from m2_plugin.foundry.flops import FlopCounter
from m2_plugin.foundry.private import ContrastiveConfig
from m2_plugin.foundry.starting_points import build_from_keys, prepare_for_composer
from m2_plugin.models.modeling_m2_bert import M2BertEmbeddingOutput, M2BertForTextEmbedding
from m2_plugin.suggest import check_keys

__all__ = ["M2BertContrastive", "orthogonal_projection_loss"]

INFONCE, ORTHOGONAL = LOSSES = ("infonce", "orthogonal_projection")
# Keys of llm-foundry's config that another setting replaces.
REPLACED_BY = {
    "vector_representation": "config_overrides.classifier_pooling (cls or mean)",
    "pos_step_size": "the number of negatives in the data",
}


def orthogonal_projection_loss(cosines: Tensor, labels: Tensor, negative_weight: float) -> Tensor:
    """Pull each query to its passage, and make it orthogonal to all other passages.

    mean(1 − cos⁺) + γ · mean(|cos⁻|), by Ranasinghe et al. (arXiv 2103.14021); the M2-BERT
    retrieval models (arXiv 2402.07440) use it. One query with one negative is enough, which matters
    for long texts: a batch for InfoNCE does not fit in memory. Two choices are ours. Absolute
    values are taken before the mean, so that negatives on both sides of 0 do not cancel, and the
    passages of the other queries in the batch are negatives too.

    Args:
        cosines: (Q, N) cosines of queries and passages.
        labels: (Q,) int64, the passage of each query.
        negative_weight: γ.

    Returns:
        A scalar; its second term is 0 if there is no negative.
    """
    own = torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, labels[:, None], True)
    positive = (1 - cosines[own]).mean()
    negatives = cosines[~own]
    return positive + negative_weight * negatives.abs().sum() / max(negatives.numel(), 1)


class M2BertContrastive(FinetuneEmbeddingModel):
    """`M2BertForTextEmbedding` in llm-foundry's contrastive model; `m2_bert_contrastive` in a YAML.

    The trained embedding is the model's own `sentence_embedding`: the saved folder gives the same
    one in transformers and sentence-transformers. llm-foundry handles pairs and hard negatives,
    scores, temperature, and the gathering over ranks.

    `tokenizer`, `pretrained`, `config_overrides` and `init_device` are those of
    `m2_plugin.foundry.models.BertComposerModel`.

    Args:
        tokenizer: The run's tokenizer.
        pretrained_model_name_or_path: A folder, name or file to start from. A pretrained model has
            no pooler; then a new one is made, and logged.
        pretrained: Whether to load the weights too.
        config_overrides: Fields of the config; `classifier_pooling` and `normalize_embeddings`
            define the embedding.
        init_device: The device to build on.
        loss: "infonce" (cross-entropy over the passages in the batch) or "orthogonal_projection".
        negative_weight: γ of the orthogonal projection loss.
        contrastive_config: llm-foundry's: `temperature` (InfoNCE), `normalize_output`,
            `gather_in_batch_negatives`, `infonce_process_group_size`,
            `use_legacy_gradient_passthrough`.
        loss_fn: "torch_crossentropy", or "fused_crossentropy", which needs flash-attn.

    Raises:
        ValueError: For the reasons of `BertComposerModel`, or if a key or a loss is unknown or does
            not apply.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pretrained_model_name_or_path: str | None = None,
        pretrained: bool | None = None,
        config_overrides: Mapping[str, Any] | None = None,
        init_device: str = "cpu",
        loss: str = INFONCE,
        negative_weight: float = 1.0,
        contrastive_config: Mapping[str, Any] | None = None,
        loss_fn: str = "torch_crossentropy",
    ):
        settings = dict(contrastive_config or {})
        _check_contrastive(loss, settings)
        self._run_tokenizer = tokenizer  # llm-foundry does not pass it to `construct_model`
        super().__init__(
            tokenizer=tokenizer,
            contrastive_config=settings,
            pretrained_model_name_or_path=pretrained_model_name_or_path,
            pretrained=pretrained,
            config_overrides=config_overrides,
            init_device=init_device,
            use_flash_attention_2=False,
            loss_fn=loss_fn,
        )
        self.objective = loss
        self.negative_weight = negative_weight
        self.count_flops = FlopCounter(self.model)
        prepare_for_composer(self.model)

    def construct_model(self) -> M2BertForTextEmbedding:
        """Build the model inside llm-foundry's."""
        return build_from_keys(
            AutoModelForTextEncoding,
            None,
            "m2_bert",
            tokenizer=self._run_tokenizer,
            path=self.pretrained_model_name_or_path,
            pretrained=self.pretrained,
            config_overrides=self.config_overrides,
            init_device=self.init_device,
        )

    def _update_step_size_if_needed(self, batch: MutableMapping) -> None:
        # llm-foundry keeps the first batch's: wrong if the evaluation has another number.
        if batch["input_ids"].ndim == 3:
            self.step_size = batch["input_ids"].shape[1]

    def flops_per_batch(self, batch: Mapping[str, Any]) -> float:
        """Count the operations of a training step on this rank's batch; see `FlopCounter`."""
        return self.count_flops(batch)

    def get_hidden_state(self, outputs: M2BertEmbeddingOutput) -> Tensor:
        """Return the embeddings as hidden states of one position, (B·P, 1, D)."""
        assert outputs.sentence_embedding is not None
        return outputs.sentence_embedding.unsqueeze(1)

    def _compute_scores(
        self, batch: MutableMapping, outputs: M2BertEmbeddingOutput
    ) -> tuple[Tensor, Tensor]:
        # The model has pooled already: llm-foundry pools one position again.
        ids = batch["input_ids"][:, :1]
        one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return super()._compute_scores(one, outputs)

    def loss(self, outputs: M2BertEmbeddingOutput, batch: MutableMapping) -> Tensor:
        """Compute the loss of a batch.

        Args:
            outputs: The outputs of `forward`.
            batch: The batch, (B·P, L), as `forward` leaves it.

        Raises:
            ValueError: In training, if there is only one pair, which has no negatives.
        """
        scores, labels = self._compute_scores(batch, outputs)
        if self.training and scores.numel() == 1:
            raise ValueError(
                "A batch of one pair has no negatives: set device_train_microbatch_size to 2 or "
                "more and train_loader.drop_last to true, or give the data negatives."
            )
        if self.objective == INFONCE:
            return self.loss_fn(scores, labels)
        return orthogonal_projection_loss(scores * self.temperature, labels, self.negative_weight)


def _check_contrastive(loss: str, settings: Mapping[str, Any]) -> None:
    if loss not in LOSSES:
        raise ValueError(f"model.loss must be {' or '.join(LOSSES)}, got {loss!r}.")
    known = [field.name for field in fields(ContrastiveConfig) if field.name not in REPLACED_BY]
    for key in settings:
        if key in REPLACED_BY:
            raise ValueError(
                f"contrastive_config.{key} has no effect here: set {REPLACED_BY[key]} instead."
            )
    check_keys(settings, known, "contrastive_config")
    if loss == ORTHOGONAL and not settings.get("normalize_output", True):
        raise ValueError(
            "contrastive_config.normalize_output must be true for loss: orthogonal_projection, "
            "which needs cosines."
        )
