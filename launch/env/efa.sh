# AWS Elastic Fabric Adapter between the nodes, through the aws-ofi-nccl plug-in, which must be installed: without it NCCL
# falls back to TCP, about a tenth as fast. NCCL_DEBUG=INFO shows "NET/OFI Selected provider is efa" when it is found.

# libfabric: this provider or none, so that a missing driver is an error and not a slow run.
export FI_PROVIDER=${FI_PROVIDER:-efa}

# The rendezvous keeps to the instance's first interface family; docker0 and lo lead nowhere.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^docker,lo}
