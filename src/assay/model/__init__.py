"""Ground floor: checkpoints, sites, groups, packed weights and the ledger; every other room may use it."""
