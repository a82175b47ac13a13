"""Launch detection, device assignment, worker processes, queues, clocks and progress reporting."""
