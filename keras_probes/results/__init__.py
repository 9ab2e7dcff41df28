"""The record of what probes measured, and its files."""
