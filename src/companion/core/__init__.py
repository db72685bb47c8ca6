"""What everything else stands on: errors, random keys, places, the run store, processes, sums.

Nothing here knows a network's architecture, a dataset, an experiment or a chapter.
"""
