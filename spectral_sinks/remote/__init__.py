"""A function of a model, called where the model is: at an NDIF server, or in a rehearsal of one."""
