#!/usr/bin/env bash
# One Slurm task: its place in torch.distributed's words, its cores, then a command of megalemur. train.sbatch starts it
# with srun: once to lint, then on all ranks to train.
set -euo pipefail

export RANK=${SLURM_PROCID:?started outside srun}
export WORLD_SIZE=${SLURM_NTASKS:?started outside srun}
export LOCAL_RANK=${SLURM_LOCALID:?started outside srun}
: "${MASTER_ADDR:?train.sbatch sets it}" "${MASTER_PORT:?train.sbatch sets it}"

# Threads of this task only; Slurm counts hyper-threads as cores, and half of them is enough beside a GPU.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( (${SLURM_CPUS_PER_TASK:-1} + 1) / 2 ))}

# NUMA node of this task's GPU, or nothing where it is not known (-1: the machine has one node, or hides it).
gpu_numa_node() {
    command -v numactl >/dev/null && command -v nvidia-smi >/dev/null || return 0
    local address node
    # nvidia-smi writes 00000000:1B:00.0, the kernel 0000:1b:00.0
    address=$(nvidia-smi --id="$LOCAL_RANK" --query-gpu=pci.bus_id --format=csv,noheader 2>/dev/null) || return 0
    address=${address,,}
    node=$(cat "${SYSFS_PCI:-/sys/bus/pci/devices}/${address#0000}/numa_node" 2>/dev/null) || return 0
    [[ $node =~ ^[0-9]+$ ]] && echo "$node"
    return 0
}

binding=()
node=$(gpu_numa_node)
if [[ -n $node ]]; then
    # --all: the node of the GPU may lie outside the cores that srun chose. Tried first: the job may not own that node.
    binding=(numactl --all --cpunodebind="$node" --preferred="$node")
    "${binding[@]}" true 2>/dev/null || binding=()
fi

python=${MEGALEMUR_PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi
# exec: signals reach the trainer itself, and its exit code is the task's.
exec ${binding[@]+"${binding[@]}"} "$python" -m megalemur.cli.main "$@"
