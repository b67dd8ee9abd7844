"""What is remembered: the SQL ledger, the artifacts beside it, and the registry of generators."""
