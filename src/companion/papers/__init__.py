"""One module a paper: what its chapter trains, measures, draws and judges."""
