#!/usr/bin/env bash
# Elastic training on two hosts. If a host is lost, training continues on the other host; start the
# lost host again to use both. A restarted run resumes from the checkpoint directory in the config.
# train_batch_size does not change: with fewer ranks, each rank processes more samples per step.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec onecycle launch --hostfile "${HOSTFILE:-examples/launch/hostfile}" \
  --nnodes 1:2 --max-restarts 3 examples/fashion_mnist/train.py \
  --config examples/launch/ds_config.json "$@"
