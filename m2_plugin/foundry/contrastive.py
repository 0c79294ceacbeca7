"""Contrastive fine-tuning for retrieval: llm-foundry's contrastive model with M2-BERT inside.

    model:
      name: m2_bert_contrastive
      pretrained_model_name_or_path: ./runs/m2-bert-base/huggingface/final
      config_overrides: {classifier_pooling: mean, normalize_embeddings: true}
      loss: infonce                       # or orthogonal_projection
      contrastive_config: {temperature: 0.05}
      mini_batch_size: 4                  # texts in memory at once; the loss is of the whole batch

The data comes from llm-foundry's `contrastive_pairs` dataloader; `data_prep/convert_pairs.py`
writes it. A batch is (B, P, L): each row has a query, its passage and P − 2 hard negatives.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import fields
from typing import Any

import torch
from composer.utils import dist
from llmfoundry.models.llm_embed.finetune_embedding_model import FinetuneEmbeddingModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForTextEncoding, PreTrainedTokenizerBase

from m2_plugin.foundry.errors import one_line
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


def orthogonal_projection_loss(cosines: Tensor) -> Tensor:
    """Compute the mean squared error between the cosines of pairs and their labels.

    The label of a query and its passage is 1, that of a query and a negative 0: negatives become
    orthogonal to the query. Each negative is paired with the passage, so both halves weigh the
    same. M2-BERT's retrieval models were trained with it (arXiv 2402.07440, and the reference's
    training code). The pairs do not depend on each other, so any microbatch size gives the same
    gradient, also one query: long texts need no large batch.

    Args:
        cosines: (Q, 1 + N) cosines of each query with its passage, then with its own negatives.

    Returns:
        A scalar; if N is 0, of the first half alone.
    """
    positive = (1 - cosines[:, 0]).square().mean()
    if cosines.shape[1] == 1:
        return positive
    return (positive + cosines[:, 1:].square().mean()) / 2


class M2BertContrastive(FinetuneEmbeddingModel):
    """`M2BertForTextEmbedding` in llm-foundry's contrastive model; `m2_bert_contrastive` in a YAML.

    The trained embedding is the model's own `sentence_embedding`: the saved folder gives the same
    one in transformers and sentence-transformers. llm-foundry handles pairs and hard negatives,
    scores, temperature, and the gathering over ranks.

    `mini_batch_size` is the gradient cache of Gao et al. (arXiv 2101.06983), called cached
    multiple-negatives ranking in sentence-transformers. The texts of a batch pass through the
    encoder a few at a time, and only their embeddings are kept. From these follows the loss of the
    whole batch and its gradient at each embedding. Then each mini-batch is encoded again, with the
    same dropout, for its gradient. Loss and gradient equal those of the whole batch, and the memory
    for activations does not grow with it; the price is one more forward pass.

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
        loss: "infonce" (cross-entropy over the passages in the batch, the multiple-negatives
            ranking loss) or "orthogonal_projection".
        mini_batch_size: Texts that are encoded at a time; by default the whole microbatch.
        contrastive_config: llm-foundry's: `temperature` (InfoNCE), `normalize_output`,
            `gather_in_batch_negatives`, `infonce_process_group_size`,
            `use_legacy_gradient_passthrough`.
        loss_fn: "torch_crossentropy", or "fused_crossentropy", which needs flash-attn.

    Raises:
        ValueError: For the reasons of `BertComposerModel`, or if a key or a loss is unknown or does
            not apply.
    """

    @one_line()
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pretrained_model_name_or_path: str | None = None,
        pretrained: bool | None = None,
        config_overrides: Mapping[str, Any] | None = None,
        init_device: str = "cpu",
        loss: str = INFONCE,
        mini_batch_size: int | None = None,
        contrastive_config: Mapping[str, Any] | None = None,
        loss_fn: str = "torch_crossentropy",
    ):
        settings = dict(contrastive_config or {})
        _check_contrastive(loss, settings, mini_batch_size)
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
        if dist.get_world_size() == 1:  # nothing to gather, and perhaps no process group
            self.gather_in_batch_negatives = False
        self.objective = loss
        self.mini_batch_size = mini_batch_size
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

    def forward(self, batch: MutableMapping) -> M2BertEmbeddingOutput:
        """Embed the texts of a batch.

        Args:
            batch: Tensors (B, P, L); they become (B·P, L), as the other methods expect them.

        Returns:
            `sentence_embedding` (B·P, D), and as `last_hidden_state` the same as hidden states of
            one position, (B·P, 1, D), for llm-foundry.
        """
        self._update_step_size_if_needed(batch)
        for key, tensor in batch.items():
            batch[key] = tensor.flatten(0, -2)
        if self.mini_batch_size is None:
            embeddings = self._embed(batch)
        else:
            embeddings = self._embed_cached(batch, self.mini_batch_size)
        return M2BertEmbeddingOutput(
            last_hidden_state=embeddings.unsqueeze(1), sentence_embedding=embeddings
        )

    def _embed(self, batch: Mapping[str, Tensor]) -> Tensor:
        embeddings = self.model(**batch).sentence_embedding
        assert embeddings is not None
        return embeddings

    def _embed_cached(self, batch: Mapping[str, Tensor], size: int) -> Tensor:
        """Embed `size` texts at a time and keep only that: the backward pass embeds them again.

        Autograd goes through the mini-batches from the last to the first. Each computes its
        activations again when its turn comes, and frees them: this is the gradient cache. Since all
        is one backward pass, DDP sees the gradient of each parameter once.
        """

        def embed(part: Mapping[str, Tensor], is_first: bool) -> Tensor:
            if isinstance(self.model, FSDPModule):
                # FSDP2 gathers a unit's parameters once in a backward pass. They must stay until
                # the first mini-batch, and not longer: the optimizer changes the shards.
                self.model.set_reshard_after_backward(is_first)
            return self._embed(part)

        parts = [tensor.split(size) for tensor in batch.values()]
        embeddings: list[Tensor] = []
        for tensors in zip(*parts, strict=True):
            arguments = dict(zip(batch, tensors, strict=True)), not embeddings
            if torch.is_grad_enabled():
                embeddings.append(checkpoint(embed, *arguments, use_reentrant=False))
            else:
                embeddings.append(embed(*arguments))
        return torch.cat(embeddings)

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
            ValueError: In training, if there are no negatives.
        """
        scores, labels = self._compute_scores(batch, outputs)
        each = scores.shape[1] // scores.shape[0]  # passages of a query: its own first
        if self.objective == INFONCE:
            if self.training and scores.numel() == 1:
                raise ValueError(
                    "A batch of one pair has no negatives: set device_train_microbatch_size to 2 "
                    "or more and train_loader.drop_last to true, or give the data negatives."
                )
            return self.loss_fn(scores, labels)
        if self.training and each == 1:
            raise ValueError(
                "loss: orthogonal_projection needs negatives in the data: m2-plugin mine-negatives "
                "adds some. (infonce takes the passages of the other queries.)"
            )
        own = labels[:, None] + torch.arange(each, device=labels.device)
        return orthogonal_projection_loss(scores.gather(1, own) * self.temperature)


def _check_contrastive(loss: str, settings: Mapping[str, Any], mini_batch_size: int | None) -> None:
    if mini_batch_size is not None and (type(mini_batch_size) is not int or mini_batch_size < 1):
        raise ValueError(
            f"model.mini_batch_size must be a whole number of texts, 1 or more, got "
            f"{mini_batch_size!r}."
        )
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
