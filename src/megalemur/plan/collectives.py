"""Seconds of collectives and messages, by the alpha-beta model on rings (Thakur et al. 2005).

n processes, each with b bytes in the end (all-gather) or at the start (reduce-scatter): a ring takes
(n - 1) / n * b / bandwidth + (n - 1) * latency; an all-reduce is one of each.
"""

import math
from dataclasses import dataclass

from megalemur.plan.cluster import Cluster
from megalemur.plan.constants import Constants


@dataclass(frozen=True, slots=True)
class Links:
    """What messages reach in a node and between nodes."""

    gpus_per_node: int
    node: float
    """Bytes a second between two GPUs of a node."""
    network: float
    """Bytes a second of one GPU's share of the network."""
    node_latency: float
    network_latency: float

    @classmethod
    def of(cls, cluster: Cluster, constants: Constants) -> "Links":
        """The achievable speeds of a cluster's links."""
        return cls(
            gpus_per_node=cluster.gpus_per_node,
            node=cluster.node_gigabytes_per_second * 1e9 * constants.links,
            network=cluster.network_gigabytes_per_second * 1e9 * constants.links,
            node_latency=cluster.node_latency_seconds,
            network_latency=cluster.network_latency_seconds,
        )

    def ring(self, count: float, size: int, stride: int) -> float:
        """Seconds of an all-gather or a reduce-scatter.

        A group that has several GPUs in each node sends over all their network ports at once.

        Args:
            count: bytes of the whole, gathered tensor.
            size: processes of the group.
            stride: between neighbours of the group in the order of ranks; 1: they are neighbours on the node.
        """
        if size == 1:
            return 0.0
        inside = max(1, min(size, self.gpus_per_node // stride))
        if inside == size:
            return (size - 1) / size * count / self.node + (size - 1) * self.node_latency
        nodes = size / inside
        bandwidth = min(self.node, inside * self.network)
        # a ring's latency grows with its length; NCCL turns to trees before that hurts: log2 of the nodes
        hops = (inside - 1) * self.node_latency + 2 * self.network_latency * math.log2(max(2.0, nodes))
        return (size - 1) / size * count / bandwidth + hops

    def step(self, count: float, size: int, stride: int) -> float:
        """Seconds of one step of a ring, in which every process sends `count` bytes to the next: of the slowest link.

        Args:
            count: bytes.
            size: processes of the ring.
            stride: between neighbours in the order of ranks.
        """
        return self.message(count, stride if size * stride <= self.gpus_per_node else self.gpus_per_node)

    def message(self, count: float, stride: int) -> float:
        """Seconds of one message to a rank `stride` further on."""
        if stride < self.gpus_per_node:
            return count / self.node + self.node_latency
        return count / self.network + self.network_latency
