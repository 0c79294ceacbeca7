"""M2-BERT for transformers: importing this package registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoTokenizer,
    BertTokenizerFast,
)

from m2_plugin.models.configuration_m2_bert import M2BertConfig
from m2_plugin.models.modeling_m2_bert import (
    M2BertForMaskedLM,
    M2BertForSequenceClassification,
    M2BertForTextEmbedding,
    M2BertModel,
)

__all__ = [
    "M2BertConfig",
    "M2BertForMaskedLM",
    "M2BertForSequenceClassification",
    "M2BertForTextEmbedding",
    "M2BertModel",
]

AutoConfig.register(M2BertConfig.model_type, M2BertConfig, exist_ok=True)
AutoModel.register(M2BertConfig, M2BertModel, exist_ok=True)
AutoModelForMaskedLM.register(M2BertConfig, M2BertForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    M2BertConfig, M2BertForSequenceClassification, exist_ok=True
)
AutoModelForTextEncoding.register(M2BertConfig, M2BertForTextEmbedding, exist_ok=True)
# Pipelines load a tokenizer only for model types that are registered here.
AutoTokenizer.register(M2BertConfig, fast_tokenizer_class=BertTokenizerFast, exist_ok=True)
