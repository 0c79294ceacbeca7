#!/usr/bin/env bash
# Adapts a model to your own texts: from texts and a labelled file to predictions.
#
#     bash data_prep/adapt.sh                    # an example: web pages, the quickstart's model
#     TEXTS=reports.jsonl TRAIN=train.csv DEV=dev.csv NEW=new.csv bash data_prep/adapt.sh
#
# TEXTS has texts without labels, in any format of data_prep/README.md; TRAIN and DEV have the
# columns `text` and `label`; NEW has `text`. CONTINUE and FINETUNE hold more settings for the two
# trainings. A step that is finished is not repeated.
set -euo pipefail

START=${START:-quickstart/run/huggingface/final}  # a transformers folder, with its tokenizer
OUT=${OUT:-runs/adapted}
TEXTS=${TEXTS:-data_prep/quickstart/c4-sample.json.gz}
TOKENS=${TOKENS:-128}  # the length of the sequences; the model's, at most
HELD_OUT=${HELD_OUT:-0.05}  # the share of the texts to evaluate on

if [ -z "${TRAIN:-}" ]; then
    python data_prep/quickstart/pages.py --out "$OUT/pages"
    TRAIN=$OUT/pages/train.csv DEV=$OUT/pages/dev.csv NEW=$OUT/pages/new.csv
    FINETUNE=${FINETUNE:-optimizer.lr=1.0e-3}  # the quickstart's model is small
fi

# 1. The texts become sequences of tokens; some are held out.
python data_prep/convert_text.py --local_files "$TEXTS" --val_fraction "$HELD_OUT" --splits train val \
    --concat_tokens "$TOKENS" --tokenizer "$START" --out_root "$OUT/mds"

# 2. The loss on the held-out texts before, the pretraining goes on, and the loss after.
m2-plugin evaluate "$START" --data "$OUT/mds"
composer train.py yamls/pretrain/continue.yaml variables.start="$START" \
    variables.data="$OUT/mds" variables.out="$OUT/pretrained" variables.max_seq_len="$TOKENS" \
    ${CONTINUE:-}
m2-plugin evaluate "$OUT/pretrained/huggingface/final" --data "$OUT/mds"

# 3. Fine-tune on the labelled file, and predict.
composer train.py yamls/finetune/text-classification.yaml \
    variables.start="$OUT/pretrained/huggingface/final" variables.train="$TRAIN" \
    variables.eval="$DEV" variables.out="$OUT/classifier" variables.max_seq_len="$TOKENS" \
    ${FINETUNE:-}
m2-plugin predict "$NEW" --model "$OUT/classifier/huggingface/final" --out "$OUT/predictions.csv"
