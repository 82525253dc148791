"""One file an operation: `X_fwd -> (y, saved)` and `X_bwd(dy, saved) -> grads`, and how each becomes kernel launches."""
