"""What is loaded, streamed, planned and timed."""
