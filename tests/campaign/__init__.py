"""A campaign against the project: fuzzed inputs, faults of files, kills at random moments; see docs/robustness.md."""
