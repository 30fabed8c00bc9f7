#!/usr/bin/env bash
# Made by: python plan.py --model llama2-7b --gpu h100 --gpus 32 --tokens 1e+11 --launch examples/llama2-7b_32xh100.sh
# Predicted by formulas, not measured: 3D TP1 PP4 DP8 takes 50.3 GiB of each h100, 14.1 s a step,
# 298 k tokens/s; 100 B tokens take 3.9 days.
# DATA is a directory of data_process.py with the model's tokenizer. After a stop the same file goes on
# from the newest checkpoint. Start it on every node, with the same FIRST.
set -euo pipefail

: "${FIRST:?name or address of the first of the 4 nodes}"

torchrun --nnodes 4 --rdzv_backend c10d --rdzv_endpoint "$FIRST:29500" --nproc_per_node 8 \
  pretrain.py --model.dim 4096 --model.n_layers 32 --model.n_heads 32 --model.n_kv_heads 32 --model.hidden_dim 11008 --model.max_seq_len 4096 --model.tie_embeddings False \
  --train.backend fsdp \
  --train.pp 4 \
  --optim.optimizer adamw \
  --data.seq_len 4096 --data.batch_size 1024 \
  --train.micro_batch_size 1 \
  --train.max_steps 23842 \
  --data.dir "${DATA:-data/mine}" --out "${OUT:-out/llama2-7b}"
