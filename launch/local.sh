#!/usr/bin/env bash
# Train on this machine: launch/local.sh PROCESSES RUN.yaml [section.key=value ...]
# One process a GPU, or on CPU as many as the layout has. Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 reach every process.
set -euo pipefail

if (( $# < 2 )) || [[ ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/local.sh PROCESSES RUN.yaml [section.key=value ...]" >&2
    exit 2
fi
processes=$1
shift

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# One thread a process: PROCESSES pools as wide as the machine would fight for its cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# shellcheck source=launch/env/common.sh
source "$root/launch/env/common.sh"

# Seconds that torchrun leaves the processes to save and end after a signal; its own 30 would cut a checkpoint short.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

torchrun=torchrun
[[ -x $root/.venv/bin/torchrun ]] && torchrun=$root/.venv/bin/torchrun

# localhost by name on both sides: laptops and containers often cannot resolve their own host name.
# Signals: torchrun hands on what it handles and dies of the rest, taking the processes with it.
exec "$torchrun" \
    --nnodes=1 --nproc-per-node="$processes" \
    --rdzv-backend=c10d --rdzv-endpoint=localhost:0 --local-addr=localhost \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \
    -m megalemur.cli.main train "$@"
