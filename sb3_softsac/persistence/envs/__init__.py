"""State of environments and their wrappers."""
