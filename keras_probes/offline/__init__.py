"""Probes of a finished model: the offline driver."""
