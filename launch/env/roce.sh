# RDMA over Ethernet (RoCE v2) between the nodes. The fabric must be lossless; which traffic class is, the site knows.

# As on InfiniBand: 4.096 us x 2^22 = 17 s before a packet is sent again.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}

# To be set a cluster:
#   NCCL_IB_HCA=mlx5_0,mlx5_1,...   the adapters beside the GPUs
#   NCCL_IB_TC=106                  the traffic class whose queue is lossless; in another one congestion drops packets
#   NCCL_IB_GID_INDEX=3             the RoCE v2 address; NCCL before 2.21 does not find it by itself
#   NCCL_SOCKET_IFNAME=eth0         the interface of the rendezvous
