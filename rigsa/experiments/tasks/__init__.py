"""What a run trains on, and what its models are measured by."""
