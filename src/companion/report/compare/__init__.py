"""One report on any two networks, or more: what they are to each other, and what one may do. ::

    found = compare(module, theta_a, theta_b, data)
    print(found)                                 # the findings
    found.answer("barrier").values["heights"]    # as `companion barrier --json` has them

``value.py`` what is found · ``questions.py`` what is asked, and at which cost · ``verdicts.py``
what it means · ``sheet.py`` the page.
"""

from companion.report.compare.value import Answer, Comparison, Finding, loads

__all__ = ["Answer", "Comparison", "Finding", "loads"]
