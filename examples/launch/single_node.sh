#!/usr/bin/env bash
# Two processes on this machine. onecycle adds to torchrun: the config is proved first, the first
# failing rank's lines and exit status are shown, and nothing is left running.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec onecycle launch --nproc 2 examples/fashion_mnist/train.py \
  --config examples/fashion_mnist/ds_config.json "$@"
