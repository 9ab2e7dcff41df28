"""Joining what Keras runs: observers in a host's steps, their numbers in its logs."""
