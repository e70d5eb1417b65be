"""The methods a run can train by: one file each, and the registry that names them."""
