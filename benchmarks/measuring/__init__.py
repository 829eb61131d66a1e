"""What the benchmarks share: loads, a streaming client, processes, floors, reports. Linux only."""
