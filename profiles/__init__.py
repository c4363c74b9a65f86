"""Devices as data, and the protocol that measures latency, memory and energy."""
