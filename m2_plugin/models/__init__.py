"""M2-BERT for transformers: importing this package registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertTokenizerFast,
)

from m2_plugin.models.configuration_m2_bert import M2BertConfig
from m2_plugin.models.modeling_m2_bert import (
    M2BertForMaskedLM,
    M2BertForMultipleChoice,
    M2BertForQuestionAnswering,
    M2BertForSequenceClassification,
    M2BertForTextEmbedding,
    M2BertForTokenClassification,
    M2BertModel,
)

__all__ = [
    "M2BertConfig",
    "M2BertForMaskedLM",
    "M2BertForMultipleChoice",
    "M2BertForQuestionAnswering",
    "M2BertForSequenceClassification",
    "M2BertForTextEmbedding",
    "M2BertForTokenClassification",
    "M2BertModel",
]

AutoConfig.register(M2BertConfig.model_type, M2BertConfig, exist_ok=True)
for _auto_class, _model_class in (
    (AutoModel, M2BertModel),
    (AutoModelForMaskedLM, M2BertForMaskedLM),
    (AutoModelForMultipleChoice, M2BertForMultipleChoice),
    (AutoModelForQuestionAnswering, M2BertForQuestionAnswering),
    (AutoModelForSequenceClassification, M2BertForSequenceClassification),
    (AutoModelForTextEncoding, M2BertForTextEmbedding),
    (AutoModelForTokenClassification, M2BertForTokenClassification),
):
    _auto_class.register(M2BertConfig, _model_class, exist_ok=True)
# Pipelines load a tokenizer only for model types that are registered here.
AutoTokenizer.register(M2BertConfig, fast_tokenizer_class=BertTokenizerFast, exist_ok=True)
