#!/usr/bin/env bash
# Training on the hosts of a hostfile. The hosts must accept ssh without a password, and must have
# this directory at the same path, as a shared directory or a copy.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec onecycle launch --hostfile "${HOSTFILE:-examples/launch/hostfile}" \
  examples/fashion_mnist/train.py --config examples/fashion_mnist/ds_config.json "$@"
