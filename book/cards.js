// A link to a numbered formula shows it: on hover, and when the keyboard is on it. Escape hides it again.
document.addEventListener("DOMContentLoaded", () => {
  const card = document.createElement("div");
  card.className = "companion-card";
  card.setAttribute("role", "tooltip");
  card.id = "companion-card";
  card.hidden = true;
  document.body.append(card);
  const hide = () => { card.hidden = true; };
  const show = async (link, formula) => {
    card.replaceChildren(formula.content.cloneNode(true));
    card.hidden = false;
    if (window.MathJax?.typesetPromise) await window.MathJax.typesetPromise([card]);
    const at = link.getBoundingClientRect();
    const left = Math.min(at.left, document.documentElement.clientWidth - card.offsetWidth - 8);
    card.style.left = `${Math.max(8, left) + scrollX}px`;
    card.style.top = `${at.bottom + scrollY + 4}px`;
  };
  for (const link of document.querySelectorAll('a.reference.internal[href*="#equation-"]')) {
    const formula = document.getElementById(`card-${link.hash.slice(1)}`);
    if (!formula) continue;
    link.setAttribute("aria-describedby", card.id);
    for (const event of ["mouseenter", "focus"]) link.addEventListener(event, () => show(link, formula));
    for (const event of ["mouseleave", "blur"]) link.addEventListener(event, hide);
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
});
