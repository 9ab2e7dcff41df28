"""Probes that train in `fit`: the online driver."""
