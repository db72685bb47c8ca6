"""The papers that the chapters rerun: a module each, with everything a chapter's cells call.

A module has ``design``, which checks the parameters and returns the study; the study, whose
experiments run when they are first read; ``CLAIMS``, one function a claim that turns the study into
a statistic; and one function a figure. The chapter keeps the prose and the few lines that matter.
"""
