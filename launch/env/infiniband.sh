# InfiniBand between the nodes. NCCL finds the adapters by itself; what follows is for large and busy fabrics.

# Time before a packet is sent again, 4.096 us x 2^22 = 17 s (NCCL's 20: 4 s). On thousands of ports a switch that
# reroutes takes longer than 4 s, and the job would die of one flapping link.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}

# To be set a cluster, where the guess is wrong:
#   NCCL_IB_HCA=mlx5_0,mlx5_1,...   the adapters beside the GPUs, when others carry storage
#   NCCL_SOCKET_IFNAME=eth0         the interface of the rendezvous, when the first one found does not reach all nodes
