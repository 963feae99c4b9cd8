# Environment of every launch, sourced by local.sh and train.sbatch. A value that is already set is kept.
# How long a collective may take is no environment variable: it is in the run file.

# CUDA: one hardware queue, so that kernels start in the order of their launch. Before Blackwell, tensor and sequence
# parallelism rely on it: the collective must be queued ahead of the matrix product that it overlaps with.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# torch's allocator: segments that grow instead of new ones beside them. Pipeline stages allocate in many sizes, and
# fragments of gigabytes are lost without it. (torch before 2.9 reads PYTORCH_CUDA_ALLOC_CONF.)
if [[ -z ${PYTORCH_CUDA_ALLOC_CONF:-} ]]; then
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
fi

# NCCL: errors and warnings, each with host, process and GPU; INFO when a fabric is brought up.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Python: every thread's stack on a crash, and lines that reach the log of a rank before it dies.
export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}

# Triton writes its compiled kernels under the home folder; on a shared file system all ranks would write at once.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-${USER:-$(id -u)}}
