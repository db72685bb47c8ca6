"""From values to a page: output, figures, plots, tables, claims, records, provenance. Never
trains."""
