"""The optimizer that Lightning sees, and its learning-rate and weight-decay schedules."""
