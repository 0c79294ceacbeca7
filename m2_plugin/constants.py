"""Values that light modules and models share. This module imports nothing."""

VOCAB_MULTIPLE = 8  # M2-BERT and its BERT baseline are published with 30,522 padded to 30,528
POOLINGS = ("cls", "mean")  # what a pooler can read: the first token, or the mean of all tokens
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
