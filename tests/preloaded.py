"""Imports all that a training run imports, for processes that are forked to run one.

Composer asks whether a model is one of transformers' causal language models, and to answer
transformers imports all of those: three seconds in each process that has not. It also asks a new
process for the name of the CPU, which takes a second, and keeps the answer.
"""

import llmfoundry.command_utils  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from composer.utils.collect_env import get_cpu_model
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

import m2_plugin.foundry.preflight
import m2_plugin.train_report.draw  # noqa: F401

MODEL_CLASSES = list(MODEL_FOR_CAUSAL_LM_MAPPING.values())
CPU_MODEL = get_cpu_model()
