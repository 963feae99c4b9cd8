#!/usr/bin/env bash
# Train on this machine: launch/local.sh PROCESSES RUN.yaml [section.key=value ...]
# One process a GPU, or on CPU as many as the layout has. Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 reach every process: the
# first one saves, a second one ends the run at once. Ends with the exit code of the run (docs/running.md).
# No torchrun: it ends with 1 whatever the ranks say, and imports torch once more than there are ranks.
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

python=${MEGALEMUR_PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    [[ -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
fi

# Two ports that nobody listens on, below 32768, where the kernel hands out ports by itself.
port=$(( 20000 + 2 * ($$ % 6000) ))
taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
while taken "$port" || taken $(( port + 1 )); do
    port=$(( port < 31998 ? port + 2 : 20000 ))
done
# The address, not the name: laptops and containers often cannot resolve their own host name.
export MASTER_ADDR=127.0.0.1 MASTER_PORT=$port MEGALEMUR_SUPERVISOR_PORT=$(( port + 1 ))
MEGALEMUR_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export MEGALEMUR_TOKEN
# A rank ends when this script is gone, however it ended.
export MEGALEMUR_LAUNCHER_PID=$$ WORLD_SIZE=$processes

pids=()
handed_on=()
hand_on() {
    handed_on+=("$(( 128 + $(kill -l "$1") ))")
    (( ${#pids[@]} == 0 )) || kill "-$1" "${pids[@]}" 2>/dev/null || true
}
for name in INT USR1 USR2 TERM; do
    # shellcheck disable=SC2064
    trap "hand_on $name" "$name"
done
trap 'hand_on TERM' HUP QUIT

# A process group for each rank: a terminal sends Ctrl-C to the whole group of this script, and it is handed on besides.
set -m
for (( rank = 0; rank < processes; rank++ )); do
    RANK=$rank LOCAL_RANK=$rank "$python" -m megalemur.cli.main train "$@" </dev/null &
    pids+=($!)
done

# The supervisors end all ranks together. One that was gone before it had met the others leaves them waiting for it.
end_together() {
    local alone=0 pid living
    while sleep 1; do
        living=()
        for pid in "${pids[@]}"; do
            kill -0 "$pid" 2>/dev/null && living+=("$pid")
        done
        (( ${#living[@]} > 0 )) || return 0
        (( ${#living[@]} == processes )) || alone=$(( alone + 1 ))
        (( alone < 8 )) || kill -KILL "${living[@]}" 2>/dev/null || true
    done
}
end_together </dev/null &
guard=$!
trap 'kill -- "-$guard" 2>/dev/null || true' EXIT

# All ranks end with the code of the run, but for those that were killed from outside: theirs counts last.
chosen=0
for pid in "${pids[@]}"; do
    code=0
    while :; do
        seen=${#handed_on[@]}
        now=0
        wait "$pid" || now=$?
        (( now == 127 )) || code=$now    # 127: it was waited for already
        (( seen == ${#handed_on[@]} )) && break    # else a trap may have cut `wait` short
    done
    # ended by a signal that was handed on: it had not begun to listen, and nothing is lost
    for signal_code in ${handed_on[@]+"${handed_on[@]}"}; do
        (( code == signal_code )) && code=10
    done
    if (( code != 0 && (chosen == 0 || (chosen >= 128 && code < 128)) )); then
        chosen=$code
    fi
done
exit "$chosen"
