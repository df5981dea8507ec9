"""What tests and benchmarks share: tolerances, sample inputs, guarded memory, the timer. Nothing else imports it."""
