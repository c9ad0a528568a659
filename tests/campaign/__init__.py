"""A campaign against the project: fuzzed inputs, injected faults of files, kills at random moments; docs/robustness.md."""
