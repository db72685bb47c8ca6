// Excerpts of what was found. Their text is in searchtexts.js, which only the search page loads, so no page is
// fetched, and they are there from the disk, too.
document.addEventListener("DOMContentLoaded", () => {
  const results = document.getElementById("search-results");
  if (!results || typeof pageTexts === "undefined") return;
  const asked = new URLSearchParams(location.search).get("q") ?? "";
  const words = asked.toLowerCase().match(/[\p{L}\p{N}-]+/gu) ?? [];
  const place = (text) => {
    const found = words.map((word) => text.toLowerCase().indexOf(word)).filter((at) => at >= 0);
    return found.length ? Math.min(...found) : -1;
  };
  const mark = (text, into) => {
    let rest = text;
    while (rest) {
      const [at, length] = words
        .map((word) => [rest.toLowerCase().indexOf(word), word.length])
        .filter(([start]) => start >= 0)
        .reduce((best, next) => (next[0] < best[0] ? next : best), [rest.length, 0]);
      into.append(rest.slice(0, at));
      if (!length) return;
      const marked = document.createElement("mark");
      marked.textContent = rest.slice(at, at + length);
      into.append(marked);
      rest = rest.slice(at + length);
    }
  };
  const excerpt = (item) => {
    const link = item.querySelector("a");
    if (!link || item.querySelector("p.context")) return;
    const [page, anchor] = link.getAttribute("href").split("#");
    const sections = pageTexts[page.replace(/\.html$/, "")] ?? {};
    const own = anchor && place(sections[anchor] ?? "") >= 0 ? [sections[anchor]] : Object.values(sections);
    const text = own.find((one) => place(one) >= 0) ?? own[0];
    if (!text) return;
    const start = place(text) > 80 ? text.indexOf(" ", place(text) - 80) + 1 : 0; // a whole word
    const says = document.createElement("p");
    says.className = "context";
    mark((start ? "… " : "") + text.slice(start, start + 260).trim() + (start + 260 < text.length ? " …" : ""), says);
    item.append(says);
  };
  new MutationObserver(() => results.querySelectorAll("li").forEach(excerpt))
    .observe(results, { childList: true, subtree: true });
});
