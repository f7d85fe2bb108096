#!/usr/bin/env bash
# Goes on with one host of two when the other is lost, and with both when it is started again. The
# config names a checkpoint folder, from which a restarted run goes on; train_batch_size stays what
# it is, so that fewer ranks take larger shares.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec onecycle launch --hostfile "${HOSTFILE:-examples/launch/hostfile}" \
  --nnodes 1:2 --max-restarts 3 examples/fashion_mnist/train.py \
  --config examples/launch/ds_config.json "$@"
