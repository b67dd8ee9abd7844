"""Where it runs: Ray. Nothing here knows of the ledger."""
