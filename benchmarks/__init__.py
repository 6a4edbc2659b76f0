"""Measurements: each prints its versions, its command's options and one line of JSON per variant."""
