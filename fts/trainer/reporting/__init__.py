"""Logs, metrics files, memory, log level."""
