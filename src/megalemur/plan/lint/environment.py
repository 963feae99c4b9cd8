"""Rules about the machine and its environment variables; silent where no GPU is about to be used."""

from megalemur.config.run import RunConfig
from megalemur.plan.lint.finding import Texts
from megalemur.plan.lint.machine import Site
from megalemur.plan.lint.scale import GIB, size
from megalemur.supervise.signals import STOP_SIGNALS

_SLOW_LINKS = ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE")
_STOPS = {str(int(each)): each.name for each in STOP_SIGNALS}
_HANDLES_A_RANK = 256  # torch, NCCL and the supervisor; two a source come on top


def tasks_match_layout(config: RunConfig, site: Site) -> Texts:
    """The batch job starts another number of processes than the layout has.
    https://github.com/NVIDIA-NeMo/RL/issues/1182"""
    text = site.environ.get("MEGALEMUR_TASKS") or site.environ.get("WORLD_SIZE", "")
    if text.isdigit() and int(text) != config.parallel.world_size:
        yield (
            f"the job has {text} tasks, but parallel is tensor {config.parallel.tensor} x pipeline "
            f"{config.parallel.pipeline} x context {config.parallel.context} x data {config.parallel.data} = "
            f"{config.parallel.world_size}; change the nodes of the job, or parallel.data"
        )


def connections_not_one(config: RunConfig, site: Site) -> Texts:
    """CUDA_DEVICE_MAX_CONNECTIONS is not 1 with sequence or context parallelism: before Blackwell, nothing then makes a
    collective start ahead of the product that it overlaps with.
    https://github.com/NVIDIA/Megatron-LM/issues/533"""
    now = site.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if site.is_launch and (config.parallel.sequence_parallel or config.parallel.context > 1) and now != "1":
        yield (
            f"CUDA_DEVICE_MAX_CONNECTIONS is {now or 'not set'}; with parallel.tensor={config.parallel.tensor} "
            "export 1 "
            "on Hopper and older GPUs, as launch/env/common.sh does"
        )


def connections_one_without_tensor(config: RunConfig, site: Site) -> Texts:
    """CUDA_DEVICE_MAX_CONNECTIONS=1 without tensor or context parallelism: gradients do not overlap with anything.
    https://github.com/NVIDIA/Megatron-LM/issues/1468"""
    parallel = config.parallel
    if (
        site.is_launch
        and parallel.tensor == parallel.context == 1
        and parallel.overlap_grad_reduce
        and site.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"
    ):
        yield (
            "CUDA_DEVICE_MAX_CONNECTIONS=1 with parallel.tensor=1 and parallel.context=1 keeps "
            "parallel.overlap_grad_reduce from overlapping; export CUDA_DEVICE_MAX_CONNECTIONS=8"
        )


def nccl_links_disabled(site: Site) -> Texts:
    """NCCL is told to leave the links between the GPUs of a node alone.
    https://github.com/NVIDIA/nccl/issues/631"""
    for name in _SLOW_LINKS:
        if site.is_launch and site.is_on(name):
            yield f"{name}={site.environ[name]} makes every collective inside a node slower; unset it"


def nccl_network_disabled(site: Site) -> Texts:
    """NCCL is told to leave InfiniBand and RoCE alone, and several nodes then talk over TCP.
    https://github.com/scottclowe/pytorch-experiment-template/issues/11
    https://github.com/hiyouga/LlamaFactory/issues/6111"""
    if site.is_launch and site.nodes > 1 and site.is_on("NCCL_IB_DISABLE"):
        yield (
            f"NCCL_IB_DISABLE={site.environ['NCCL_IB_DISABLE']} with {site.nodes} nodes: all traffic between them goes "
            "over TCP; unset it"
        )


def nccl_takes_a_signal(site: Site) -> Texts:
    """NCCL dumps its state at a signal with which a job is asked to stop: the run never hears of it, and does not save.
    https://github.com/NVIDIA/nccl/issues/704 https://github.com/facebookincubator/submitit/pull/1697"""
    number = site.environ.get("NCCL_PROXY_DUMP_SIGNAL", "").strip()
    if site.is_launch and number in _STOPS:
        yield (
            f"NCCL_PROXY_DUMP_SIGNAL={number} takes {_STOPS[number]} away from the run, which saves and stops at it; "
            "unset it, or give it a signal that nobody else uses"
        )


def errors_not_handled(site: Site) -> Texts:
    """Collectives that fail or run out of time no longer end the process.
    https://github.com/pytorch/pytorch/pull/44163"""
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING"):
        if site.is_launch and site.environ.get(name) == "0":
            yield f"{name}=0: a collective that runs out of time no longer ends the process; unset it"


def kernels_wait_for_each_other(site: Site) -> Texts:
    """A variable for debugging that was left on: every kernel waits for the one before.
    https://github.com/ByteDance-Seed/VeOmni/pull/115"""
    if site.is_launch and site.is_on("CUDA_LAUNCH_BLOCKING"):
        yield "CUDA_LAUNCH_BLOCKING is on: nothing overlaps, and a step takes several times as long; unset it"


def threads_oversubscribed(config: RunConfig, site: Site, gpus_per_node: int) -> Texts:
    """OMP_NUM_THREADS times the tasks of a node is more than its cores.
    https://github.com/pytorch/torchtitan/issues/4038 https://github.com/pytorch/pytorch/issues/22260"""
    text = site.environ.get("OMP_NUM_THREADS", "")
    tasks = min(gpus_per_node, config.parallel.world_size)
    here = site.cores if "SLURM_PROCID" not in site.environ else site.cores * tasks  # a task is bound to its share
    if site.is_launch and text.isdigit() and int(text) * tasks > here and int(text) > 1:
        yield (
            f"OMP_NUM_THREADS={text} x {tasks} tasks is more than the {here} cores of the node; export "
            f"OMP_NUM_THREADS={max(1, here // tasks)}, or leave it to launch/slurm/task.sh"
        )


def allocator_fragments(config: RunConfig, site: Site) -> Texts:
    """torch's allocator without expandable segments: pipeline stages lose gigabytes in fragments.
    https://github.com/meta-pytorch/torchtune/issues/1185"""
    set_to = site.environ.get("PYTORCH_ALLOC_CONF") or site.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    if site.is_launch and "expandable_segments:true" not in set_to.lower().replace(" ", ""):
        yield (
            f"PYTORCH_ALLOC_CONF is {set_to or 'not set'}: memory is lost in fragments; export "
            "PYTORCH_ALLOC_CONF=expandable_segments:True, as launch/env/common.sh does"
        )


def shared_memory_small(site: Site) -> Texts:
    """A container's 64 MB of /dev/shm, where NCCL wants about 10 MB for each pair of GPUs.
    https://github.com/NVIDIA/nccl/issues/342 https://github.com/NVIDIA/JAX-Toolbox/issues/183"""
    if site.is_launch and site.shared_memory is not None and site.shared_memory < GIB:
        yield (
            f"/dev/shm has {size(site.shared_memory)}: NCCL ends with a bus error when it is full; start the container "
            "with --ipc=host or --shm-size=8g"
        )


def open_files_few(config: RunConfig, site: Site) -> Texts:
    """A limit of open files that the sources and the connections exceed.
    https://github.com/pytorch/pytorch/issues/14768"""
    needed = 2 * (len(config.data.sources) + len(config.data.validation)) + _HANDLES_A_RANK
    # rank 0's supervisor and the rendezvous hold a connection of every rank
    needed += 4 * config.parallel.world_size
    if site.open_files < needed:
        yield (
            f"the limit of open files is {site.open_files:.0f}, and rank 0 may need {needed}; raise it with ulimit -n "
            f"{max(4096, needed)}"
        )


def locked_memory_small(site: Site) -> Texts:
    """A limit of locked memory with which InfiniBand cannot register its buffers.
    https://github.com/NVIDIA/nccl-tests/issues/206"""
    if site.is_launch and site.infiniband and site.nodes > 1 and site.locked_memory < GIB:
        yield (
            f"the limit of locked memory is {size(site.locked_memory)}, and InfiniBand registers gigabytes; set it to "
            "unlimited (ulimit -l unlimited; limits.conf, or --ulimit memlock=-1 of the container)"
        )


RULES = (
    ("error", tasks_match_layout),
    ("warning", connections_not_one),
    ("warning", connections_one_without_tensor),
    ("warning", nccl_links_disabled),
    ("warning", nccl_network_disabled),
    ("warning", nccl_takes_a_signal),
    ("warning", errors_not_handled),
    ("warning", kernels_wait_for_each_other),
    ("warning", threads_oversubscribed),
    ("warning", allocator_fragments),
    ("warning", shared_memory_small),
    ("warning", open_files_few),
    ("warning", locked_memory_small),
)
