"""Where the energy of the residual stream lies and what its bands say. Also the means that fills use."""
