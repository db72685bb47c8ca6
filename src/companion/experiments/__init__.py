"""What the papers measure, over stored runs: forks, matched pairs, merged networks, features.

An experiment takes recipes and asks the run store; it trains and measures only what is missing,
and returns values. How they look on a page is :mod:`companion.report`'s business.
"""
