"""One module a paper: its experiment as a design, a function a claim, a function a figure.

A chapter makes a study of its parameters, ``design(...)``, and reads its experiments, which are
run when they are first asked for. What computes a claim's statistic, and what a caption says, are
functions of the study that a test can call.
"""
