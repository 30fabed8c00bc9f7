#!/usr/bin/env bash
# Made by: python plan.py --model llama2-7b --gpu h100 --gpus 8 --tokens 2e+10 --launch examples/llama2-7b_8xh100.sh
# Predicted by formulas, not measured: FSDP2 takes 74.4 GiB of each h100, 54.3 s a step,
# 77.3 k tokens/s; 20 B tokens take 71.9 hours.
# DATA is a directory of data_process.py with the model's tokenizer. After a stop the same file goes on
# from the newest checkpoint.
set -euo pipefail

torchrun --nproc_per_node 8 \
  pretrain.py --model.dim 4096 --model.n_layers 32 --model.n_heads 32 --model.n_kv_heads 32 --model.hidden_dim 11008 --model.max_seq_len 4096 --model.tie_embeddings False \
  --train.backend fsdp \
  --optim.optimizer adamw \
  --data.seq_len 4096 --data.batch_size 1024 \
  --train.micro_batch_size 2 \
  --train.max_steps 4769 \
  --data.dir "${DATA:-data/mine}" --out "${OUT:-out/llama2-7b}"
