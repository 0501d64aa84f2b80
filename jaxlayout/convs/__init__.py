"""One convolution, many ways: its signature, the candidates to compute it, the primitive that holds a choice."""
