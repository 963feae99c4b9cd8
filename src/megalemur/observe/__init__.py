"""What the run says: meters, throughput, sinks, reports."""
