"""From text to site: jupytext, papermill, Jupyter Book. The Makefile calls this package's commands.

    chapters/NN_name.md       the source: a MyST notebook with one cell tagged ``parameters``
      notebooks               -> build/notebooks/NN_name.ipynb     plain, ready for papermill
      execute --profile P     -> build/P/executed/NN_name.ipynb    as papermill left it
      stage   --profile P     -> build/P/book/                     a complete Jupyter Book
      html    --profile P     -> build/P/book/_build/html/         the site, checked

Make owns what is out of date; nothing here caches. ``python -m companion.book --help`` lists the
commands. The modules: :mod:`layout` (where things are), :mod:`parameters` (the cell and the
profiles), :mod:`notebooks` (text to notebook to executed notebook), :mod:`finish` (what a page
needs), :mod:`stage` (the source tree of the site), :mod:`site` (build and checks).
"""
