#!/usr/bin/env bash
# The same with plain torchrun. A script that calls engine.initialize needs nothing else.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec torchrun --standalone --nproc_per_node 2 examples/fashion_mnist/train.py "$@"
