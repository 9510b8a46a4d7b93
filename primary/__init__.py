"""The process that owns the memory: supplies, growth and shrinking, the daemon."""
