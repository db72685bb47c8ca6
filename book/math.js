// A formula that is wider than the page scrolls in its own box; then the keyboard has to reach it.
document.addEventListener("DOMContentLoaded", () => {
  const reachable = () => {
    for (const formula of document.querySelectorAll('mjx-container[display="true"]')) {
      if (formula.scrollWidth > formula.clientWidth) {
        formula.tabIndex = 0;
      } else {
        formula.removeAttribute("tabindex");
      }
    }
  };
  window.addEventListener("load", () => {
    const typeset = window.MathJax?.startup?.promise;
    if (typeset) typeset.then(reachable);
  });
  window.addEventListener("resize", reachable);
});
