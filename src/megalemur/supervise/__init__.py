"""A process beside each rank: signals, heartbeats, deaths. Free of torch; knows nothing of what the rank computes."""
