"""Processes, devices, queues and clocks: what the stages run on."""
