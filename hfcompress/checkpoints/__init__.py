"""Save and reload: the record, the hooks, the portable folder."""
