"""One step of Algorithm 1 as a transaction, from the gradient to x."""
