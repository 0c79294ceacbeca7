"""Contrastive fine-tuning for retrieval: the host's contrastive model around M2-BERT's embeddings.

    model:
      name: m2_bert_contrastive
      pretrained_model_name_or_path: ./runs/m2-bert-base/huggingface/final
      config_overrides: {classifier_pooling: mean, normalize_embeddings: true}
      loss: infonce                       # or orthogonal_projection
      contrastive_config: {temperature: 0.05}

Data comes from the host's `contrastive_pairs` dataloader, which `data_prep/convert_pairs.py` writes
for: a batch is (B, P, L), each row a query, its passage and P − 2 hard negatives.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import fields
from typing import Any

import torch
from llmfoundry.models.llm_embed.finetune_embedding_model import FinetuneEmbeddingModel
from torch import Tensor
from transformers import AutoModelForTextEncoding, PreTrainedTokenizerBase

from m2_plugin.foundry.models import build_from_keys, prepare_for_host
from m2_plugin.foundry.private import ContrastiveConfig
from m2_plugin.models.modeling_m2_bert import M2BertEmbeddingOutput, M2BertForTextEmbedding
from m2_plugin.suggest import check_keys

__all__ = ["M2BertContrastive", "orthogonal_projection_loss"]

INFONCE, ORTHOGONAL = LOSSES = ("infonce", "orthogonal_projection")
# The host's keys that have nothing to say here, and what says it.
ELSEWHERE = {
    "vector_representation": "config_overrides.classifier_pooling (cls or mean)",
    "pos_step_size": "the data: each row says how many negatives it has",
}


def orthogonal_projection_loss(cosines: Tensor, labels: Tensor, negative_weight: float) -> Tensor:
    """Pull each query onto its passage, and make it orthogonal to all others.

    mean(1 − cos⁺) + γ · mean(|cos⁻|). No term compares passages with each other, so one query with
    one negative is enough: where texts are long, a batch for InfoNCE does not fit. The loss is that
    of Ranasinghe et al. (arXiv 2103.14021), which the M2-BERT retrieval models (arXiv 2402.07440)
    name for that reason. Ours are two choices: absolute values are taken before the mean, so that
    negatives on both sides of 0 do not cancel; and passages of the other queries in the batch are
    negatives too.

    Args:
        cosines: (Q, N) cosines of queries and passages.
        labels: (Q,) int64, which passage belongs to each query.
        negative_weight: γ.

    Returns:
        A scalar; its second part is 0 where there is no negative.
    """
    own = torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, labels[:, None], True)
    positive = (1 - cosines[own]).mean()
    negatives = cosines[~own]
    return positive + negative_weight * negatives.abs().sum() / max(negatives.numel(), 1)


class M2BertContrastive(FinetuneEmbeddingModel):
    """`M2BertForTextEmbedding` in the host's contrastive model; `m2_bert_contrastive` in a YAML.

    The embedding that is trained is the model's own `sentence_embedding`, hence the one that the
    saved folder gives in transformers and sentence-transformers. Pairs and hard negatives, the
    scores, their temperature and their gathering over ranks are the host's.

    Args:
        tokenizer: The run's tokenizer; the host passes it.
        pretrained_model_name_or_path: A folder, name or file to start from, as
            `m2_plugin.foundry.models.BertComposerModel` takes it. A pretraining has no pooler; one
            is then made, and logged.
        pretrained: See there.
        config_overrides: See there; `classifier_pooling` and `normalize_embeddings` say what an
            embedding is.
        init_device: See there.
        loss: "infonce" (cross-entropy over the passages in the batch) or "orthogonal_projection".
        negative_weight: γ of the orthogonal projection loss.
        contrastive_config: The host's: `temperature` (InfoNCE), `normalize_output`,
            `gather_in_batch_negatives`, `infonce_process_group_size`,
            `use_legacy_gradient_passthrough`.
        loss_fn: The host's cross-entropy: "torch_crossentropy" or "fused_crossentropy", which needs
            flash-attn.

    Raises:
        ValueError: As `BertComposerModel`, or for a key or a loss that is unknown or does not
            apply.
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
        self._run_tokenizer = tokenizer  # which the host gives `construct_model` no sight of
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
        prepare_for_host(self.model)

    def construct_model(self) -> M2BertForTextEmbedding:
        """Build the model that the host wraps."""
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
        # The host keeps the first batch's for ever: wrong where the evaluation has other negatives.
        if batch["input_ids"].ndim == 3:
            self.step_size = batch["input_ids"].shape[1]

    def get_hidden_state(self, outputs: M2BertEmbeddingOutput) -> Tensor:
        """Return the embeddings as hidden states of one position, (B·P, 1, D)."""
        assert outputs.sentence_embedding is not None
        return outputs.sentence_embedding.unsqueeze(1)

    def _compute_scores(
        self, batch: MutableMapping, outputs: M2BertEmbeddingOutput
    ) -> tuple[Tensor, Tensor]:
        # The model has pooled: what the host pools again is one position, which counts.
        ids = batch["input_ids"][:, :1]
        one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return super()._compute_scores(one, outputs)

    def loss(self, outputs: M2BertEmbeddingOutput, batch: MutableMapping) -> Tensor:
        """The loss of a batch that `forward` has run on.

        Args:
            outputs: What `forward` returned.
            batch: The batch, in the form (B·P, L) that `forward` leaves.

        Raises:
            ValueError: While training, if there is but one pair, from which nothing can be learnt.
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
    known = [field.name for field in fields(ContrastiveConfig) if field.name not in ELSEWHERE]
    for key in settings:
        if key in ELSEWHERE:
            raise ValueError(f"contrastive_config.{key} is set by {ELSEWHERE[key]}.")
    check_keys(settings, known, "contrastive_config")
    if loss == ORTHOGONAL and not settings.get("normalize_output", True):
        raise ValueError(
            "contrastive_config.normalize_output: the orthogonal projection loss is of cosines, "
            "it must be true."
        )
