#!/bin/sh
# Turns rows of text into a .bin/.idx pair of token ids: sh scripts/prepare_data.sh [--flag value ...]
#
# For large plain data that many runs share. It is not needed otherwise: training reads every format that README names
# and keeps what it tokenised beside it. As it stands: the bundled corpus, in seconds.
# `python -m rwkv_bone.data.prepare --help` lists every flag. Paths below are relative to the repository; paths given as
# flags are relative to where you are.
set -eu

input=assets/corpus_train.jsonl # rows with a text each: JSON lines (or .gz), a JSON list, CSV, Parquet
output=out/corpus_train         # common name of the pair, output.bin and output.idx
tokenizer=bytes                 # that of the model: world, bytes, or the path of a tokenizer.json
field=text                      # name of the field that holds the text
workers=0                       # processes; 0 = by the size of the input

# shellcheck source=scripts/lib.sh
. "$(dirname -- "$0")/lib.sh"

PYTHONPATH=$repo/src${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m rwkv_bone.data.prepare \
    --input "$(in_repo "$input")" --output "$(in_repo "$output")" \
    --tokenizer "$tokenizer" --field "$field" --workers "$workers" "$@"
